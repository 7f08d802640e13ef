"""UORA: fine-tuned models as tiny vectors over frames that come from seeds (arXiv 2505.20154).

Importing ``uora`` is light; ``uora.tuner``, ``uora.training`` and ``uora.serving`` need torch.
"""

import logging

from uora.imports import put_off

# peft imports it wherever it is installed. It brings 700 modules along, torch's inductor among them, and asks CUDA for
# its devices; it is only there for quantised base models.
put_off("bitsandbytes")
# At every import it regrets an optional kernel that only a model hub has.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
