"""ARCHITECTURES lists the model families: a new one is a file in `families` and a line here."""

from nanoflow_backend.models.families.ernie4_5 import ERNIE4_5
from nanoflow_backend.models.families.glm import GLM
from nanoflow_backend.models.families.helium import HELIUM
from nanoflow_backend.models.families.llama import LLAMA
from nanoflow_backend.models.families.ministral import MINISTRAL
from nanoflow_backend.models.families.mistral import MISTRAL
from nanoflow_backend.models.families.mixtral import MIXTRAL
from nanoflow_backend.models.families.phi3 import PHI3
from nanoflow_backend.models.families.qwen2 import QWEN2
from nanoflow_backend.models.families.qwen3 import QWEN3
from nanoflow_backend.models.families.qwen3_moe import QWEN3_MOE
from nanoflow_backend.models.families.seed_oss import SEED_OSS
from nanoflow_backend.models.families.smollm3 import SMOLLM3

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        LLAMA,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        MISTRAL,
        MINISTRAL,
        MIXTRAL,
        PHI3,
        SEED_OSS,
        SMOLLM3,
        GLM,
        ERNIE4_5,
        HELIUM,
    )
}
