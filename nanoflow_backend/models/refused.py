"""MISSING says of well-known model classes what they need that this engine does not compute."""

IMAGES = "images and the layers that read them are missing here"
LATENT = "latent attention (MLA), and experts in groups that are scored by a sigmoid, are missing here"
SOFT_CAPS = "norms with 1 + weight and after each block, GELU, scaled embeddings"
LINEAR = "layers of linear attention or of a state-space model are missing here"
EXPERTS_BESIDE = "experts that all tokens share, beside the routed ones, are missing here"

MISSING = {
    "Llama4ForConditionalGeneration": f"attention in chunks, layers without positions, and {EXPERTS_BESIDE}",
    "Llama4ForCausalLM": f"attention in chunks, layers without positions, and {EXPERTS_BESIDE}",
    "MllamaForConditionalGeneration": IMAGES,
    "GptOssForCausalLM": "attention sinks, sliding windows, biases of experts and MXFP4 weights are missing here",
    "GemmaForCausalLM": f"{SOFT_CAPS} are missing here",
    "Gemma2ForCausalLM": f"{SOFT_CAPS}, sliding windows and soft caps of scores and logits are missing here",
    "Gemma3ForCausalLM": f"{SOFT_CAPS} and sliding windows are missing here",
    "Gemma3ForConditionalGeneration": f"{SOFT_CAPS}, sliding windows and images are missing here",
    "Gemma3nForConditionalGeneration": f"{SOFT_CAPS}, sliding windows and images are missing here",
    "DeepseekV2ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": LATENT,
    "DeepseekV32ForCausalLM": LATENT,
    "KimiK2ForCausalLM": LATENT,
    "Qwen2MoeForCausalLM": EXPERTS_BESIDE,
    "Qwen3NextForCausalLM": LINEAR,
    "Qwen2VLForConditionalGeneration": IMAGES,
    "Qwen2_5_VLForConditionalGeneration": IMAGES,
    "Qwen3VLForConditionalGeneration": IMAGES,
    "Qwen3VLMoeForConditionalGeneration": IMAGES,
    "Mistral3ForConditionalGeneration": IMAGES,
    "Phi4MMForCausalLM": "images and sound, and the layers that read them, are missing here",
    "Phi3VForCausalLM": IMAGES,
    "PhiMoEForCausalLM": "layer norms with biases, and sparsemixer routing, are missing here",
    "Glm4ForCausalLM": "norms after each block are missing here",
    "Glm4MoeForCausalLM": EXPERTS_BESIDE,
    "Cohere2ForCausalLM": "layer norms, parallel blocks, scaled logits and sliding windows are missing here",
    "CohereForCausalLM": "layer norms, parallel blocks and scaled logits are missing here",
    "FalconH1ForCausalLM": LINEAR,
    "JambaForCausalLM": LINEAR,
    "MambaForCausalLM": LINEAR,
    "Olmo2ForCausalLM": "norms of whole queries and keys, and after each block, are missing here",
    "Olmo3ForCausalLM": "norms of whole queries and keys, and after each block, are missing here",
    "Exaone4ForCausalLM": "norms after each block are missing here",
    "GraniteForCausalLM": "multipliers of embeddings, scores, updates and logits are missing here",
    "HunYuanDenseV1ForCausalLM": "norms of heads after their rotation are missing here",
    "Ministral3ForCausalLM": "scales of queries by position are missing here",
    "ArceeForCausalLM": "an MLP without a gate, with the square of ReLU, is missing here",
    "ApertusForCausalLM": "an MLP without a gate, with xIELU, is missing here",
    "Ernie4_5_MoeForCausalLM": EXPERTS_BESIDE,
}
