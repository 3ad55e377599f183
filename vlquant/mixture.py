"""A bundle with some layers of its reference in the places of its own. Reads tensors, runs nothing."""

from torch import Tensor

from vlquant.checkpoint import Rows
from vlquant.model import Model


class Mixture:
    """Read like a `Model`: everything is the bundle's but for the `restored` layers of the language model."""

    def __init__(self, bundle: Model, reference: Model, restored: frozenset[int]):
        self.bundle, self.reference, self.restored = bundle, reference, restored
        self.config, self.folder, self.gptq_version = bundle.config, bundle.folder, bundle.gptq_version
        self.checkpoint = bundle.checkpoint

    def decoder_layer(self, index: int) -> dict[str, Tensor]:
        """All tensors of decoder layer `index` by relative name, packed or float."""
        return (self.reference if index in self.restored else self.bundle).decoder_layer(index)

    def tensor(self, name: str) -> Tensor:
        """A tensor outside the layers."""
        return self.bundle.tensor(name)

    @property
    def embedding_rows(self) -> Rows:
        """From ids [count] to rows [count, hidden_size] of the embedding."""
        return self.bundle.embedding_rows
