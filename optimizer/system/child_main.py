"""The beginning of a child process: `python -m planish.optimizer.system.child_main MODULE DESCRIPTOR PARENT`.

A child that is importing for seconds must end with its parent as well, so this is done before anything large is
imported. `child_process` starts it.
"""

from __future__ import annotations

import importlib
import os
import sys

from planish.optimizer.system import interrupts


def end_with(parent: int) -> None:
    """End this process when ``parent``, which started it, ends; at once if it has ended already."""
    interrupts.end_with_parent()
    if os.getppid() != parent:  # it ended before the system was asked to take us along
        os._exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv[3]))
    importlib.import_module(sys.argv[1]).main()
