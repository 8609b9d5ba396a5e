"""Calls of functions as text, for chat templates that do not render them.

Next: `template.py` (who renders), `kivnun/serve/tools.py` (who reads calls back).
"""

from __future__ import annotations

MARKS = (("<|tool_call|>", "<|/tool_call|>"), ("<tool_call>", "</tool_call>"))
"""What stands around a list of calls: Phi-4-mini's own tokens, and plain text for bases without them."""
