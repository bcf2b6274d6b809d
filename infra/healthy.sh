#!/bin/sh
# Whether this container is healthy: a Ray head must take jobs. Any other command is healthy while it runs.
# 1 is the container's own command, or a small init that has it among its arguments. The port of the cluster itself
# (`ray health-check`) answers some seconds before the one for jobs.
case "$(tr '\0' ' ' <"${1:-/proc/1/cmdline}")" in
*"ray start --head"*)
    exec python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8265/api/gcs_healthz', timeout=10)"
    ;;
esac
