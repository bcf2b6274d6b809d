#!/bin/sh
# Whether this container is healthy: a Ray head must take jobs. Any other command is healthy while it runs.
# 1 is the container's own command, or a small init that has it among its arguments. The cluster's own port
# (`ray health-check`) answers first, then the one for jobs, then the agent that starts them: both of those are asked.
case "$(tr '\0' ' ' <"${1:-/proc/1/cmdline}")" in
*"ray start --head"*)
    python - <<'END'
import urllib.request

for page in ("8265/api/gcs_healthz", "52365/api/local_raylet_healthz"):
    urllib.request.urlopen(f"http://127.0.0.1:{page}", timeout=7)
END
    ;;
esac
