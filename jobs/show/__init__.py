"""What `lorc` tells without changing anything: plans, status, logs, methods, spectra."""
