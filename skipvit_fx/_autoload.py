"""Lets ``skipvit doctor`` start where a broken backend extension would fail ``import torch``. Imported first."""

import os
import sys
from pathlib import Path

if Path(sys.argv[0]).stem == "skipvit" and sys.argv[1:2] == ["doctor"]:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
