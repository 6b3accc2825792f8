"""Importing the packages changes nothing of the process."""

import subprocess
import sys


def test_importing_changes_no_setting() -> None:
    code = (
        "import numcodecs.blosc as b, torch, zarr; b.use_threads = None; before = b.use_threads, torch.backends.mkldnn.matmul.fp32_precision;"
        "import signal_store, model_taps.attention, teacher_cache.builder.session, teacher_cache.builder.seal, student_train.session.training, signal_store.io.shard_writer;"
        "assert (b.use_threads, torch.backends.mkldnn.matmul.fp32_precision) == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
