"""All features of generated classes, in order of precedence."""

from gift.core import delta, forwards, frozen_norms, network, save_pretrained
from gift.core.dynamic_class import Feature
from gift.core.weights import bitsandbytes, mixin

FEATURES: tuple[Feature, ...] = (
    # Outermost: the wrapped forward pass runs the layer's own one inside, fast path or not.
    forwards.feature,
    # A call must be registered as begun before anything in it reads a weight.
    mixin.called_feature,
    # A fast path takes precedence over ...
    mixin.adapted_feature,
    # ... the general forward that layers of bitsandbytes have for any effective weight.
    bitsandbytes.feature,
    frozen_norms.feature,
    save_pretrained.feature,
    # After the features of layers: a network that is itself a layer loads its state as the layer
    # does.
    network.feature,
    # Last: deltas are added around what the author's own state methods see.
    delta.feature,
)
"""The features, each a function of a plain class and a spec. In the method resolution order, the
mixins of an earlier feature precede those of a later one. If several set the same class attribute,
the last one wins."""
