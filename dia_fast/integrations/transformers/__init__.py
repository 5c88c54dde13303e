"""dia-fast behind `transformers.DiaForConditionalGeneration` (4.57 and 5.x).

from dia_fast.integrations.transformers import accelerate

model = accelerate(DiaForConditionalGeneration.from_pretrained("nari-labs/Dia-1.6B-0626"))
model.generate(**inputs)  # as before, on the engine of dia-fast
"""

from dia_fast.integrations.transformers.attention import register as _register
from dia_fast.integrations.transformers.fallback import FallbackWarning
from dia_fast.integrations.transformers.kernel_layers import kernel_mapping
from dia_fast.integrations.transformers.patch import accelerate, refresh, unaccelerate
from dia_fast.integrations.transformers.processor import processor

_register()  # attn_implementation="dia_fast"

__all__ = ["FallbackWarning", "accelerate", "kernel_mapping", "processor", "refresh", "unaccelerate"]
