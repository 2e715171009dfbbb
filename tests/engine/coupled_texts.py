"""Toys around decoders of transformers that drop attention; they read the toy's parts as embedded tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from tests.toys import FEATURES, Toy

RATE = 0.1


class Reader(nn.Module):
    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk
        self.leave = nn.Linear(FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4, 16] -> [B, 4]"""
        out: Tensor = self.leave(self.trunk(inputs_embeds=x, use_cache=False).last_hidden_state).squeeze(2)
        return out


class Gpt2(Toy):
    attention: ClassVar[str] = "sdpa"

    def model(self) -> nn.Module:
        config = GPT2Config(
            vocab_size=8,
            n_positions=8,
            n_embd=FEATURES,
            n_layer=1,
            n_head=2,
            attn_pdrop=RATE,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=self.attention,
        )
        return Reader(GPT2Model(config))


class EagerGpt2(Gpt2):
    attention = "eager"


class Llama(Toy):
    """Its attention keeps the bare rate and calls a function with it."""

    attention: ClassVar[str] = "sdpa"

    def model(self) -> nn.Module:
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=FEATURES,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            attention_dropout=RATE,
            attn_implementation=self.attention,
        )
        return Reader(LlamaModel(config))


class EagerLlama(Llama):
    attention = "eager"
