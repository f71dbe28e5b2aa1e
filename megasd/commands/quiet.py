"""Keep libraries quiet about themselves."""

from __future__ import annotations

import os
import sys
import warnings


def quiet_libraries() -> None:
    """Silence what libraries say about themselves at import; call it before they are imported.

    Megatron without TransformerEngine and Apex warns in every module that it will use torch
    instead. torch warns that Megatron calls old names. A user can do nothing about either. Warnings
    of megasd and of other libraries are shown. `python -W`, PYTHONWARNINGS and the two variables
    below bring everything back.
    """
    if not sys.warnoptions:
        for library in ("megatron", "torch", "transformers"):
            warnings.filterwarnings("ignore", module=rf"{library}\b")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
