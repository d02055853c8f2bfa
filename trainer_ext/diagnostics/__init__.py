"""What a model's own gradients say about the choice of an optimizer and of its options.

    samples of a few training steps (collect) -> figures (measures, kfac) -> findings and advice
    (findings) -> figures and a page (figures, report)

:class:`DiagnosticsCallback` does all of it in a Trainer run, ``hf-precond diagnose`` in a script's.
"""

from __future__ import annotations

from trainer_ext.diagnostics.callback import DiagnosticsCallback

__all__ = ["DiagnosticsCallback"]
