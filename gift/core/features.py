"""The features of generated classes, in one order."""

from gift.core import delta, forwards, frozen_norms, network, save_pretrained
from gift.core.dynamic_class import Feature
from gift.core.weights import bitsandbytes, mixin

FEATURES: tuple[Feature, ...] = (
    # A wrapped forward pass has the layer's own within it, be that a fast path or not.
    forwards.feature,
    # A call must have begun before anything in it reads a weight.
    mixin.called_feature,
    # A fast path is preferred to ...
    mixin.adapted_feature,
    # ... the forward that computes with any weight, which layers of bitsandbytes have beside it.
    bitsandbytes.feature,
    frozen_norms.feature,
    save_pretrained.feature,
    # A network that is itself a layer loads its state as that layer does.
    network.feature,
    # The author's own methods of a state come last: deltas are around what those see.
    delta.feature,
)
"""Each gives mixins and attributes for a plain class and a spec. In the method resolution order the
mixins of an earlier one come before those of a later one; of attributes the later one counts."""
