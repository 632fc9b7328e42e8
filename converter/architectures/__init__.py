"""The architectures that can be converted, by their name in config.json."""

from .architecture import Architecture
from .gpt_oss import GPT_OSS
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .olmoe import OLMOE
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE

ARCHITECTURES = {
    architecture.name: architecture for architecture in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, OLMOE, QWEN3_MOE, GPT_OSS)
}

__all__ = ["ARCHITECTURES", "Architecture"]
