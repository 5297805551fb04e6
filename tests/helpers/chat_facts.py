"""Hand-written facts of chat templates: where the assistant's text begins and what ends it.

Whoever doubts a row opens the template and reads it; the package that carries it is named in
`chat_templates`. The tokens of begin and end of text are the model's where the template writes
them itself, else stand-ins.
"""

# ruff: noqa: RUF001 - DeepSeek's markers are written with a fullwidth bar

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Facts:
    """The facts that a person reads in one template.

    Attributes:
        headers: What stands right before the assistant's text: its header, or the end of what
            the assistant answers to where the template gives it none.
        ends: The end-of-turn tokens; the one that comes first ends the turn and is trained.
        turns: How other turns begin, where nothing ends the assistant's.
        no_turn: What after a header shows that the assistant says nothing there.
        opening: What the prompt at inference has after the header. A conversation with a turn that
            lacks it is refused: no prompt would lead to that turn.
        goes_on: What follows an end token when the same turn goes on.
        open_end: Whether the last turn of a conversation is written without its end token.
        trains_header: Whether the prompt at inference lacks the header: the model writes it.
        marks: Whether the template marks what the assistant wrote. Then a turn without the opening
            is trained from its mark.
        bos, eos: The tokenizer's tokens; the end-of-turn token where `eos` is not given.
        refused: Why a conversation has no exact spans, by its name; by `*` for all.
    """

    headers: tuple[str, ...]
    ends: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    no_turn: tuple[str, ...] = ()
    opening: str = ""
    goes_on: str | None = None
    open_end: bool = False
    trains_header: bool = False
    marks: bool = False
    bos: str = "<s>"
    eos: str | None = None
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def eos_token(self) -> str:
        return self.eos or (self.ends[0] if self.ends else "</s>")


CALLS = ("tools", "tools_null", "tools_json", "tools_parallel", "tools_twice", "thinking_tools")
NO_TEXT = {"tools_text": "A turn with a call loses its text."}
NO_EMPTY = dict.fromkeys(("empty_first", "empty_last"), "An empty turn has no whole header or end.")
NO_HEADER = "A call without text is written without a header, as if the user had made it."

CHATML = Facts(("<|im_start|>assistant\n",), ("<|im_end|>",))
CHATML_THINK = replace(CHATML, opening="<think>\n")
CHATML_NO_THINK = replace(CHATML, opening="<think>\n\n</think>\n\n")
LLAMA_2 = Facts(("[/INST]",), ("</s>",))
CHATML_MARKS = replace(CHATML, marks=True)
LLAMA_3 = Facts(
    ("<|start_header_id|>assistant<|end_header_id|>\n\n",), ("<|eot_id|>",), bos="<|begin_of_text|>"
)
LLAMA_3_1 = replace(LLAMA_3, refused=NO_TEXT)
MISTRAL = Facts(("[/INST]", "[/TOOL_RESULTS]"), ("</s>",), no_turn=("[TOOL_RESULTS]",))
GEMMA = Facts(("<start_of_turn>model\n",), ("<end_of_turn>",), bos="<bos>", eos="<eos>")
GEMMA_4 = Facts(
    ("<|turn>model\n", "<tool_response|>"),
    ("<turn|>", "<|tool_response>"),
    no_turn=("<|tool_response>",),
    bos="<bos>",
    eos="<eos>",
)
MISTRAL_NO_TEXT = replace(MISTRAL, refused=NO_TEXT)
PHI_3 = Facts(("<|assistant|>\n",), ("<|end|>",), eos="<|endoftext|>")
ZEPHYR = Facts(("<|assistant|>\n",), ("</s>",))
DEEPSEEK = Facts(
    ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    ("<｜end▁of▁sentence｜>",),
    ("<｜tool▁outputs▁begin｜>",),  # a turn with one call lacks its end
    bos="<｜begin▁of▁sentence｜>",
)
DEEPSEEK_THINK = replace(DEEPSEEK, opening="<think>\n")
COHERE = Facts(
    ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",), ("<|END_OF_TURN_TOKEN|>",), bos="<BOS_TOKEN>"
)
COHERE_2 = replace(COHERE, headers=("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",))
OLMO_3 = replace(CHATML, ends=("<|im_end|>", "<|endoftext|>"), eos="<|endoftext|>")
GRANITE = Facts(("<|start_of_role|>assistant<|end_of_role|>",), ("<|end_of_text|>",))
GLM = Facts(
    ("<|assistant|>",),
    turns=("<|user|>", "<|observation|>", "<|tool|>", "<|system|>"),
    eos="<|endoftext|>",
)
HARMONY = Facts(
    ("<|start|>assistant",),
    ("<|return|>", "<|call|>", "<|end|>"),
    goes_on="<|start|>assistant",
    refused=NO_TEXT,
)
KIMI = Facts(("<|im_assistant|>assistant<|im_middle|>",), ("<|im_end|>",))

FACTS: dict[str, Facts] = {
    # ChatML and its children
    "01-ai-Yi-1.5-9B-Chat": CHATML,
    "HuggingFaceTB-SmolLM2-135M-Instruct": CHATML,
    "HuggingFaceTB-SmolLM3-3B": CHATML,
    "LiquidAI-LFM2-1.2B": CHATML,
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": replace(CHATML, refused=NO_TEXT),
    "NousResearch-Hermes-3-Llama-3.1-8B": CHATML,
    "NousResearch-Hermes-4-14B": replace(CHATML, refused=NO_EMPTY),
    "AI4Chem-ChemLLM-7B-Chat-1_5-DPO": Facts(  # answers end without a token
        ("<|im_start|>assistant\n",), turns=("<|im_start|>",)
    ),
    "Qwen-QwQ-32B@16488a": CHATML_THINK,
    "Qwen-Qwen2-1.5B-Instruct": CHATML,
    "Qwen-Qwen2.5-7B-Instruct": CHATML,
    "Qwen-Qwen3-0.6B": CHATML,
    "Qwen-Qwen3-0.6B@a55ee1": CHATML,
    "Qwen-Qwen3-4B-Instruct-2507": CHATML,
    "Qwen-Qwen3-4B-Thinking-2507": CHATML_THINK,
    "Qwen-Qwen3-Coder-30B-A3B-Instruct": CHATML,
    "Qwen-Qwen3.5-0.8B": CHATML_NO_THINK,
    "ai21labs-AI21-Jamba2-3B": CHATML,
    "allenai-Olmo-3-7B-Instruct": OLMO_3,
    "allenai-Olmo-3-7B-Think": replace(OLMO_3, opening="<think>"),
    "internlm-internlm2_5-7b-chat": CHATML,
    "openbmb-MiniCPM3-4B": CHATML,
    "openbmb-MiniCPM4.1-8B": CHATML,
    "stabilityai-stable-code-instruct-3b": CHATML,
    "tiiuae-Falcon-H1-0.5B-Instruct": CHATML,
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": CHATML_THINK,
    "microsoft-phi-4": Facts(("<|im_start|>assistant<|im_sep|>",), ("<|im_end|>",)),
    "Kimi-K2-Instruct": KIMI,
    "Kimi-K2-Thinking": KIMI,
    # Llama, Mistral and their children
    "codellama-CodeLlama-7b-Instruct-hf": LLAMA_2,
    "mistralai-Mistral-7B-Instruct-v0.2": LLAMA_2,
    "mistralai-Mistral-7B-Instruct-v0.3": MISTRAL_NO_TEXT,
    "mistralai-Mistral-Nemo-Instruct-2407": MISTRAL_NO_TEXT,
    "mistralai-Mistral-Small-24B-Instruct-2501": MISTRAL,
    "mistralai-Mistral-Large-Instruct-2411": MISTRAL,
    "Mistral-Small-3.2-24B-Instruct-2506": MISTRAL_NO_TEXT,
    "mistralai-Ministral-3-3B-Reasoning-2512": MISTRAL,
    "NousResearch-Meta-Llama-3-8B-Instruct": LLAMA_3,
    "NousResearch-Meta-Llama-3.1-8B-Instruct": LLAMA_3,  # always adds the prompt
    "meta-llama-Llama-3.1-8B-Instruct": LLAMA_3_1,
    "meta-llama-Llama-3.2-3B-Instruct": LLAMA_3_1,
    "nvidia-Llama-3.1-Nemotron-70B-Instruct-HF": LLAMA_3_1,
    "meetkai-functionary-medium-v3.2": replace(LLAMA_3, opening=">>>"),
    "openchat-openchat-3.6-8b-20240522": replace(
        LLAMA_3, headers=("<|start_header_id|>GPT4 Correct Assistant<|end_header_id|>\n\n",)
    ),
    "trl-internal-testing-tiny-Llama4ForCausalLM": Facts(
        ("<|header_start|>assistant<|header_end|>\n\n",), ("<|eot|>",)
    ),
    # Gemma and Phi
    "trl/gemma": GEMMA,
    "google-gemma-2-2b-it": GEMMA,
    "trl/gemma3": GEMMA,
    "google-gemma-4-E4B-it": replace(
        GEMMA_4, refused={"tools_text": "The text of a turn with a call follows the call's result."}
    ),
    "microsoft-Phi-3-mini-4k-instruct": PHI_3,
    "microsoft-Phi-3-small-8k-instruct": PHI_3,
    "microsoft-Phi-3-medium-128k-instruct": PHI_3,
    "microsoft-Phi-3.5-mini-instruct": PHI_3,
    "microsoft-Phi-4-mini-reasoning": replace(PHI_3, headers=("<|assistant|>",)),
    # DeepSeek
    "deepseek-ai-deepseek-coder-6.7b-instruct": Facts(("### Response:\n",), ("<|EOT|>",)),
    "deepseek-ai-DeepSeek-V2-Lite-Chat": Facts(("Assistant:",), ("</s>",)),
    "deepseek-ai-DeepSeek-V2.5": DEEPSEEK,
    "trl/deepseekv3": DEEPSEEK_THINK,
    "deepseek-ai-DeepSeek-V3.1": replace(
        DEEPSEEK,
        headers=("<｜Assistant｜><think></think>", "<｜tool▁output▁end｜>"),
        no_turn=("<｜tool▁output▁begin｜>",),
    ),
    "trl/deepseek_r1_distill": DEEPSEEK_THINK,
    "trl-internal-testing-tiny-DeepseekV3ForCausalLM-0528": DEEPSEEK,
    # Zephyr, Tülu, OLMo, Falcon
    "openbmb-OmniLMM-12B": ZEPHYR,
    "allenai-Llama-3.1-Tulu-3-8B-SFT": ZEPHYR,
    "allenai-OLMoE-1B-7B-0924-Instruct": ZEPHYR,
    "allenai-OLMoE-1B-7B-0125-Instruct": ZEPHYR,
    "tiiuae-Falcon3-7B-Instruct": replace(
        ZEPHYR, no_turn=("<tool_response>",), refused=dict.fromkeys(CALLS, NO_HEADER)
    ),
    "tiiuae-falcon-7b-instruct": Facts(("\n\nAssistant:",), turns=("\n\nUser:",)),
    "tiiuae-falcon-11B": Facts(("Falcon:\n",), turns=("User: \n",)),
    # Cohere, Granite, GLM
    "trl/cohere": COHERE,
    "trl/cohere2": COHERE_2,
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": replace(
        COHERE,
        opening="<|START_THINKING|><|END_THINKING|>",
        refused={"*": "The template adds the prompt at inference to every conversation."},
    ),
    "CohereForAI-c4ai-command-r-plus-tool_use": replace(
        COHERE,
        turns=("<|START_OF_TURN_TOKEN|>",),
        refused={"*": "Instructions for the next turn end every conversation."},
    ),
    "ibm-granite-granite-3.0-8b-instruct": GRANITE,
    "ibm-granite-granite-3.1-8b-instruct": GRANITE,
    "ibm-granite-granite-3.3-2B-Instruct": GRANITE,
    "ibm-granite-granite-4.0": GRANITE,
    "ibm-granite-granite-7b-instruct": replace(ZEPHYR, ends=("<|endoftext|>",), trains_header=True),
    "ibm-granite-granite-8b-code-instruct-4k": Facts(("Answer:\n",), turns=("Question:\n",)),
    "zai-org-chatglm3-6b": GLM,
    "zai-org-glm-4-9b-chat": replace(GLM, refused=NO_EMPTY),
    "zai-org-GLM-4-9B-0414": GLM,
    "zai-org-GLM-4.5-Air": GLM,
    "GLM-4.6": GLM,
    "GLM-4.7-Flash": replace(GLM, opening="<think>"),
    # Others
    "openai-gpt-oss-120b": HARMONY,
    "nvidia-Nemotron-Mini-4B-Instruct": Facts(
        ("<extra_id_1>Assistant\n",), turns=("<extra_id_1>",)
    ),
    "nvidia-Nemotron-H-8B-Base-8K": Facts(("<SPECIAL_11>Assistant\n",), turns=("\n<SPECIAL_11>",)),
    "NVIDIA-Nemotron-Nano-v2": Facts(
        ("<SPECIAL_11>Assistant\n",), ("<SPECIAL_12>",), opening="<think>\n"
    ),
    "alpindale-WizardLM-2-8x22B": Facts((" ASSISTANT:",), ("</s>",)),
    "openchat-openchat-3.5-0106": Facts(("GPT4 Correct Assistant:",), ("<|end_of_turn|>",)),
    "upstage-SOLAR-10.7B-Instruct-v1.0": Facts(("### Assistant:\n",), turns=("### User:\n",)),
    "LGAI-EXAONE-EXAONE-3.5-7.8B-Instruct": Facts(("[|assistant|]",), ("[|endofturn|]",)),
    "LGAI-EXAONE-EXAONE-4.0-32B": Facts(
        ("[|assistant|]\n",), ("[|endofturn|]",), opening="<think>\n\n</think>\n\n"
    ),
    "MiniMax-M2": Facts(("]~b]ai\n",), ("[e~[",), opening="<think>\n"),
    "ByteDance-Seed-OSS": Facts(("<seed:bos>assistant\n",), ("<seed:eos>",), refused=NO_EMPTY),
    "baidu-ERNIE-4.5-21B-A3B-Base-PT": Facts(("Assistant: ",), ("<|end_of_sentence|>",)),
    "swiss-ai-Apertus-8B-Instruct-2509": Facts(("<|assistant_start|>",), ("<|assistant_end|>",)),
    "tencent-Hunyuan-A13B-Instruct": Facts(("<|extra_0|>",), ("<|eos|>",)),
    "ServiceNow-AI-Apriel-1.6-15b-Thinker": Facts(
        ("<|begin_assistant|>\n",),
        ("<|end|>",),
        opening="Here are my reasoning steps:\n",
        open_end=True,
        refused={"*": "Answers lack the words that the prompt at inference puts in their mouth."},
    ),
    "OrionStarAI-Orion-14B-Chat": Facts(("Assistant: </s>",), ("</s>",)),
    "Salesforce-xLAM-1b-fc-r": Facts(("### Response:",), ("<|EOT|>",)),
    "inclusionAI-Ling-lite-1.5": Facts(("<role>ASSISTANT</role>",), turns=("<role>",)),
    "tomg-group-umd-huginn-0125": Facts(
        ("<|begin_header|>Huginn<|end_header|>\n\n",), ("<|end_turn|>",)
    ),
    # TRL's, which mark what the assistant wrote
    "trl/qwen3": CHATML,
    "trl/qwen2_5_training": CHATML_MARKS,
    "trl/qwen2_5_vl_training": CHATML_MARKS,
    "trl/qwen3_training": CHATML_MARKS,
    "trl/qwen3_vl_training": CHATML_MARKS,
    "trl/qwen3_instruct_2507_training": CHATML_MARKS,
    "trl/qwen3_5_think_training": replace(CHATML_THINK, marks=True),
    "trl/qwen3_5_nothink_training": replace(CHATML_NO_THINK, marks=True),
    "trl/nemotron_3_nano_training": replace(CHATML_THINK, marks=True),
    "trl/lfm2_training": CHATML_MARKS,
    "trl/lfm2_v2_training": CHATML_MARKS,
    "trl/llama3_training": LLAMA_3,
    "trl/gemma_training": GEMMA,
    "trl/gemma3_training": GEMMA,
    "trl/phi3_training": PHI_3,
    "trl/cohere_training": COHERE,
    "trl/cohere2_training": COHERE_2,
    "trl/deepseekv3_training": replace(
        DEEPSEEK_THINK,
        marks=True,
        headers=(*DEEPSEEK.headers, "<｜tool▁output▁end｜>"),
        no_turn=("<｜tool▁output▁begin｜>", "<｜tool▁outputs▁end｜>"),
    ),
    "trl/deepseek_r1_distill_training": replace(DEEPSEEK_THINK, marks=True),
    "trl/glm4moe_training": replace(
        GLM,
        ends=("<|user|>", "<|observation|>", "<|system|>"),
        turns=(),  # its marks hold them
    ),
    "trl/gptoss_training": HARMONY,
    "trl/muse_glimmer_training": Facts(
        ("<|start|>assistant",), ("<|eot|>",), marks=True, refused=NO_TEXT
    ),
}
