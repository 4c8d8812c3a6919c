"""One thread a worker where tests run side by side: threads that wait for one another's cores slow everything."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
