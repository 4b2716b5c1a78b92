"""Each framework's Adam as that framework defines it: rate, betas, ε and where it is added, weight decay.

The arguments have the names of `adam_fn.adam` and the framework's defaults; without a default there, they have none
here. Each docstring gives the update, the framework's names for the arguments where they differ ("There: ..."), and the
source file. In the formulas ``m`` and ``v`` are the raw moments, ``m̂ = m/(1-β₁ᵗ)``, ``v̂ = v/(1-β₂ᵗ)`` and ``α_t = α
√(1-β₂ᵗ)/(1-β₁ᵗ)``: an ε beside the raw ``√v`` is the paper's epsilon hat (arXiv 1412.6980, section 2). `weight_decay`
is off unless a number is given. Rates and other numbers may be schedules, as everywhere in adam_fn.

Not here, because no rule of adam_fn does the same: optax's ``amsgrad`` (it takes the maximum of the corrected v),
MXNet's ``AdamW`` (it multiplies the decay by ``α_t`` instead of ``α``) and ``Nadam`` (its product of momenta advances
once for each parameter), and Chainer's ``AdaBound``. Clipping (``clipvalue``, ``clip_gradients``, ...) is optax's,
chained before the preset.
"""

from adam_fn.presets.keras import keras2_adam as keras2_adam
from adam_fn.presets.keras import keras2_adamax as keras2_adamax
from adam_fn.presets.keras import keras2_nadam as keras2_nadam
from adam_fn.presets.keras import keras3_adam as keras3_adam
from adam_fn.presets.keras import keras3_adamax as keras3_adamax
from adam_fn.presets.keras import keras3_adamw as keras3_adamw
from adam_fn.presets.keras import keras3_nadam as keras3_nadam
from adam_fn.presets.keras import tensorflow1_adam as tensorflow1_adam
from adam_fn.presets.others import autograd_adam as autograd_adam
from adam_fn.presets.others import blocks_adam as blocks_adam
from adam_fn.presets.others import caffe_adam as caffe_adam
from adam_fn.presets.others import chainer_adam as chainer_adam
from adam_fn.presets.others import cntk_adam as cntk_adam
from adam_fn.presets.others import jax_adam as jax_adam
from adam_fn.presets.others import jax_adamax as jax_adamax
from adam_fn.presets.others import lasagne_adam as lasagne_adam
from adam_fn.presets.others import lasagne_adamax as lasagne_adamax
from adam_fn.presets.others import lasagne_amsgrad as lasagne_amsgrad
from adam_fn.presets.others import mxnet_adam as mxnet_adam
from adam_fn.presets.others import mxnet_adamax as mxnet_adamax
from adam_fn.presets.others import optax_adam as optax_adam
from adam_fn.presets.others import optax_adamw as optax_adamw
from adam_fn.presets.torch import torch_adam as torch_adam
from adam_fn.presets.torch import torch_adamax as torch_adamax
from adam_fn.presets.torch import torch_adamw as torch_adamw
from adam_fn.presets.torch import torch_nadam as torch_nadam
from adam_fn.presets.torch import torch_radam as torch_radam
