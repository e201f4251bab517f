"""Right of the plan: `cut` obeys, `mask` judges `cut`, `verify` compares them."""

from niwaki.surgery.cut import cut, cut_
from niwaki.surgery.mask import mask
from niwaki.surgery.on_disk import cut_stored, fill_stored
from niwaki.surgery.optimizer import cut_optimizer_
from niwaki.surgery.record import Surgery, surgery_of
from niwaki.surgery.renew import renew_
from niwaki.surgery.verify import verify

__all__ = [
    "Surgery",
    "cut",
    "cut_",
    "cut_optimizer_",
    "cut_stored",
    "fill_stored",
    "mask",
    "renew_",
    "surgery_of",
    "verify",
]
