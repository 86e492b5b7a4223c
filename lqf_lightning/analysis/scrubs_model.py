"""What a command has to know of a callback that scrubs the model of a finished run."""

from collections.abc import Callable

from lqf_lightning.analysis.answer_request import Answered
from lqf_lightning.analysis.finished import LooksBack
from lqf_lightning.analysis.kept_kernel import KeptKernel
from lqf_lightning.data.cohort import Cohort


class ScrubsModel(LooksBack):
    """Base of the callback that answers a request to forget.

    Attributes:
        chosen: The samples to forget; None: not yet chosen.
        kernel: Kernel of the training samples that the run has kept; None: there is none.
        answered: What the request has led to; None before.
        complete: Called by the first process with the answer, where the command has more to do.
    """

    chosen: Cohort | None = None
    kernel: KeptKernel | None = None
    answered: Answered | None = None
    complete: Callable[[Answered], None] | None = None
