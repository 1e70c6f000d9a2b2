"""To and from the authors' PyTorch checkpoints.

  names.py      which tensor of theirs is which parameter of ours, and the sizes that shapes show
  pickles.py    a pickle read as data: nothing it names is imported, called or made
  lightning.py  the tensors and the config in a Lightning .ckpt
  sources.py    SRC of `eso-jax import` (.safetensors, .ckpt, a hub repository) to a config and parameters
  parity.py     an imported model's logits against stored ones
  export.py     a work directory to .safetensors, sizes and model card, and to the hub
  card.py       the model card
"""

from eso_jax.interop.export import export_model, push
from eso_jax.interop.sources import import_checkpoint

__all__ = ["export_model", "import_checkpoint", "push"]
