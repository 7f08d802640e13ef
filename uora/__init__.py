"""UORA: fine-tuned models as tiny vectors over frames that come from seeds (arXiv 2505.20154).

Importing ``uora`` is light; ``uora.tuner``, ``uora.training`` and ``uora.serving`` need torch.
"""

import logging

# At every import it regrets an optional kernel that only a model hub has.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
