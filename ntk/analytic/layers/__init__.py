"""neural-tangents layers that it lacks: weight mean and batch norm, and the activations that go with them.

Each is a full triple (init_fn, apply_fn, kernel_fn): the kernel is what networks drawn from init_fn and apply_fn tend
to with their width, so that ``nt.monte_carlo_kernel_fn`` converges to it. They compose with the layers of
``neural_tangents.stax`` in ``serial``, ``parallel``, ``FanOut`` and ``FanInSum``. neural-tangents is imported with this
package, and not before.
"""

from ntk.analytic.layers.activation import Activation
from ntk.analytic.layers.batch_norm import BatchNormRelu
from ntk.analytic.layers.branch import Pad, Scale, sum_branches
from ntk.analytic.layers.weight_mean import Conv, WeightMean

__all__ = ["Activation", "BatchNormRelu", "Conv", "Pad", "Scale", "WeightMean", "sum_branches"]
