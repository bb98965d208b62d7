"""``python -m kata_hybrid.shim``, or this file by its path: see ``main.py``."""

import sys

# By path and without ``site`` nothing else says where the package is. This file is compiled at
# each run, so it does nothing more.
if __package__ in {None, ""}:
    root = __file__.rpartition("/kata_hybrid/shim/")[0]
    if root not in sys.path:
        sys.path.append(root)

from kata_hybrid.shim.main import main

if __name__ == "__main__":
    main(sys.argv[1:])
