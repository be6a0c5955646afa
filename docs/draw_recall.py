"""The table and the picture of docs/recall.md, by `benchmarks/recall.py`, which has the flags.

python docs/draw_recall.py runs/recall_*                          the picture is runs/recall.png
python docs/draw_recall.py runs/recall_* --out docs/recall.png    writes the one that docs/recall.md shows
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.recall import main

if __name__ == "__main__":
    sys.exit(main())
