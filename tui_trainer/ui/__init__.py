"""The terminal user interface.

Textual draws at most 60 times a second by default. A key moves a cursor and then changes the panels
that depend on its row, so the second change would wait for 17 ms. Textual reads the limit when it
is imported, so it is set here, before any module of this package imports Textual.
"""

from __future__ import annotations

import os

os.environ.setdefault("TEXTUAL_FPS", "250")
