"""The conformance kit: checks of what users expect from any optimizer, for plugin authors to run on their own.

::

    from hbcore.testing import conformance

    @conformance("Lion")
    def test_lion_conforms(check):
        check()

makes a test of each check; ``assert_conforms("Lion")`` runs them all without pytest, and ``run_checks("Lion")`` returns a
:class:`Result` for each. ``level="api-1"`` pins the checks, and ``expected_failures`` lists those that are known to fail.
``pytest --pyargs hbcore.testing.suite --hbcore-optimizer Lion`` runs each check as a separate test. The capabilities that the
optimizer declares select the checks, see :class:`hbcore.api.OptimizerSpec`. They run on the CPU and take about ten seconds.

``assert_conforms("Lion", ranks=2)``, or ``--hbcore-ranks 2``, also trains it on two processes under FSDP2: the numbers must be
those of one process, and a run must resume exactly. A rule that cannot be sharded may refuse to step, with a RuleError.

A codec has checks of its own: ``assert_codec_conforms("bf16+8")``, see :mod:`hbcore.testing.checks_codecs`.

Everything is imported on first use: pytest loads :mod:`hbcore.testing.plugin` in every run, which must not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbcore.registry.lazy import lazy

if TYPE_CHECKING:
    from hbcore.testing.catalog import CHECKS as CHECKS
    from hbcore.testing.checks_codecs import CODEC_CHECKS as CODEC_CHECKS
    from hbcore.testing.checks_ranks import RANK_CHECKS as RANK_CHECKS
    from hbcore.testing.codec_runner import assert_codec_conforms as assert_codec_conforms
    from hbcore.testing.codec_runner import check_codec as check_codec
    from hbcore.testing.codec_runner import run_codec_checks as run_codec_checks
    from hbcore.testing.codec_subject import CodecSubject as CodecSubject
    from hbcore.testing.codec_subject import codec_subjects as codec_subjects
    from hbcore.testing.decorator import conformance as conformance
    from hbcore.testing.results import Case as Case
    from hbcore.testing.results import Finding as Finding
    from hbcore.testing.results import Result as Result
    from hbcore.testing.runner import assert_conforms as assert_conforms
    from hbcore.testing.runner import check as check
    from hbcore.testing.runner import run_checks as run_checks
    from hbcore.testing.runner import subjects as subjects
    from hbcore.testing.subject import Check as Check
    from hbcore.testing.subject import Subject as Subject

_HOMES = {
    "CHECKS": "hbcore.testing.catalog:CHECKS",
    "CODEC_CHECKS": "hbcore.testing.checks_codecs:CODEC_CHECKS",
    "Case": "hbcore.testing.results:Case",
    "Check": "hbcore.testing.subject:Check",
    "CodecSubject": "hbcore.testing.codec_subject:CodecSubject",
    "RANK_CHECKS": "hbcore.testing.checks_ranks:RANK_CHECKS",
    "Finding": "hbcore.testing.results:Finding",
    "Result": "hbcore.testing.results:Result",
    "Subject": "hbcore.testing.subject:Subject",
    "assert_codec_conforms": "hbcore.testing.codec_runner:assert_codec_conforms",
    "assert_conforms": "hbcore.testing.runner:assert_conforms",
    "check": "hbcore.testing.runner:check",
    "check_codec": "hbcore.testing.codec_runner:check_codec",
    "conformance": "hbcore.testing.decorator:conformance",
    "codec_subjects": "hbcore.testing.codec_subject:codec_subjects",
    "run_checks": "hbcore.testing.runner:run_checks",
    "run_codec_checks": "hbcore.testing.codec_runner:run_codec_checks",
    "subjects": "hbcore.testing.runner:subjects",
}

__getattr__, __dir__, __all__ = lazy(__name__, _HOMES)
