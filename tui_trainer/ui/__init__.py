"""The terminal user interface.

Textual draws at most 60 times a second by default. A key first moves a cursor and then changes what
depends on its row, so the second change would wait for 17 ms. Textual reads the setting when it is
imported, so it is made here, before any module of this package imports Textual.
"""

from __future__ import annotations

import os

os.environ.setdefault("TEXTUAL_FPS", "250")
