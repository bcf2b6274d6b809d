"""Entry points: the `lorc` command and the modules that a Ray job runs."""
