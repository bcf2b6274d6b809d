"""An object store that models and work directories are in, in this process."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def object_store(monkeypatch) -> Iterator[str]:
    """moto's S3, which the processes of this test find by their environment; yields a new bucket's URL."""
    import boto3
    import fsspec
    import requests
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    requests.post(f"http://{host}:{port}/moto-api/reset")  # a process's servers share what they hold
    boto3.client("s3").create_bucket(Bucket="zoo")
    try:
        yield "s3://zoo"
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # they know this server's port
        server.stop()
