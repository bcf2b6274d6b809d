"""The services of infra/compose.yaml as plain processes on loopback: their commands and environment, at other ports.

PostgreSQL is this machine's, and moto stands for the object store: their images bring commands of their own.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import requests
import yaml

from tests.paths import REPOSITORY

COMPOSE = REPOSITORY / "infra" / "compose.yaml"
ENVIRONMENT = REPOSITORY / "infra" / "compose.env.example"
PORTS = ("5432", "8333", "5000", "6379", "8265", "52365")
START_S = 120


def example_settings(**given):
    """Those of compose.env.example, with a value of its own for each that is empty there."""
    lines = [line.partition("=") for line in ENVIRONMENT.read_text().splitlines() if line and not line.startswith("#")]
    return {name: value or f"secret-{name.lower()}" for name, _, value in lines} | given


def substituted(value, settings):
    """`${NAME:?}` and `${NAME?}` replaced, in any depth; a name that is not set is an error, as for docker compose."""
    if isinstance(value, dict):
        return {name: substituted(inner, settings) for name, inner in value.items()}
    if isinstance(value, list):
        return [substituted(inner, settings) for inner in value]
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+):?\?\}", lambda found: settings[found[1]], value)
    return value


def read_compose(settings):
    return substituted(yaml.safe_load(COMPOSE.read_text()), settings)


def postgres_programs():
    """The folder of PostgreSQL's programs, which distributions keep out of the path; None where it is absent."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    found = shutil.which("initdb")
    return folders[-1] if folders else Path(found).parent if found else None


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@dataclass
class Services:
    """Those that were started. Leaving the block stops each, the last one first.

    Attributes:
        place: A directory with a short path for what they write: sockets in it must not exceed 107 bytes.
        folders: Where the folders of the containers are here.
    """

    settings: dict
    place: Path
    folders: dict = field(default_factory=dict)
    ports: dict = field(default_factory=lambda: {port: free_port() for port in PORTS})

    def __post_init__(self):
        self.services = read_compose(self.settings)["services"]
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stack.close()

    def url(self, port):
        return f"http://127.0.0.1:{self.ports[port]}"

    def here(self, text):
        """A word of a command or of the environment, with this machine's addresses and folders."""
        ports = "|".join(PORTS)
        text = re.sub(rf"[\w.-]+:({ports})\b", lambda found: f"127.0.0.1:{self.ports[found[1]]}", text)
        text = re.sub(rf"(port=)({ports})\b", lambda found: found[1] + self.ports[found[2]], text)
        for folder, here in self.folders.items():
            text = re.sub(rf"^{folder}(?=/|$)", str(here), text)
        return text.replace("0.0.0.0", "127.0.0.1")

    def command(self, name):
        return [self.here(word) for word in self.services[name]["command"]]

    def environment(self, name):
        """The service's own over the little that processes need here; nothing else of the tests' environment."""
        here = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE") if name in os.environ}
        here |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        here |= {"HOME": str(self.place), "RAY_TMPDIR": str(self.place)}
        return here | {name: self.here(value) for name, value in self.services[name]["environment"].items()}

    def start(self, name, command, answers, **options):
        """Start a process that goes on, and return when it answers."""
        log = self.place / f"{name}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=self.place, **options
            )
        self.stack.callback(stop, process)
        for _ in range(START_S):
            if answers():
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
                break
        raise AssertionError(f"{name} does not answer:\n{log.read_text()[-4000:]}")

    def run(self, name):
        """Run a service that ends."""
        return subprocess.run(
            self.command(name), env=self.environment(name), capture_output=True, text=True, cwd=self.place
        )

    def start_postgres(self):
        """As the image does: a database, and a user with a password, who owns it."""
        programs, data = postgres_programs(), self.place / "postgres"
        asked = self.services["postgres"]["environment"]
        user = asked["POSTGRES_USER"]
        password = self.place / "password"
        password.write_text(asked["POSTGRES_PASSWORD"])
        account = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}  # it refuses root
        data.mkdir()
        if account:
            for path in (data, password):
                os.chown(path, pwd.getpwnam("postgres").pw_uid, -1)
        asks = ["--auth=scram-sha-256", f"--username={user}", f"--pwfile={password}", f"--pgdata={data}"]
        subprocess.run([programs / "initdb", *asks], check=True, stdout=subprocess.DEVNULL, cwd=data, **account)
        port = self.ports["5432"]
        at = ["-h", "127.0.0.1", "-p", port, "-k", str(data)]
        ready = [programs / "pg_isready", "-h", "127.0.0.1", "-p", port]
        self.start("postgres", [programs / "postgres", "-D", data, *at], partial(succeeds, ready), **account)
        create = [programs / "createdb", "-h", "127.0.0.1", "-p", port, "-U", user, asked["POSTGRES_DB"]]
        subprocess.run(create, check=True, env={"PGPASSWORD": asked["POSTGRES_PASSWORD"]})

    def start_objects(self):
        command = ["moto_server", "-H", "127.0.0.1", "-p", self.ports["8333"]]
        self.start_server("objects", command, f"{self.url('8333')}/moto-api/")

    def start_mlflow(self):
        self.start_server("mlflow", self.command("mlflow"), f"{self.url('5000')}/health")

    def start_ray(self):
        """With another port for Ray's client, too: other clusters may be on this machine."""
        command = [*self.command("ray-head"), f"--ray-client-server-port={free_port()}"]
        pages = f"{self.url('8265')}/api/gcs_healthz", f"{self.url('52365')}/api/local_raylet_healthz"
        self.start_server("ray-head", command, *pages)  # those of infra/healthy.sh

    def start_server(self, name, command, *pages):
        self.start(name, command, lambda: all(map(is_there, pages)), env=self.environment(name))


def succeeds(command):
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


def is_there(url):
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


def stop(process):
    """As a container is stopped: SIGTERM, then an end of all that it left."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def short_place():
    """A new directory with a short path, which other users may enter: PostgreSQL does not run as root."""
    place = Path(tempfile.mkdtemp(prefix="lorc-", dir="/tmp"))
    place.chmod(0o755)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
