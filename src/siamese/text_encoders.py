"""Encoders of texts. A text is its UTF-8 bytes with zeros behind it, uint8 [L]; see `siamese.data.texts.as_bytes`."""

import json
import os
import re
from logging import ERROR, getLogger

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from siamese.data.texts import as_texts
from siamese.frozen import Frozen

_LOADS = "implementation|auto_map|backbone|name_or_path|quantization"  # keys of a configuration that can make transformers load something
_CHUNK = 64  # texts that are embedded together, of like lengths: padding is wasted work


class Transformer(nn.Module):
    """A Hugging Face encoder, its last hidden states pooled, and a linear head if wanted. uint8 [B, L] -> [B, embedding_size].

    Sentence-BERT: Reimers and Gurevych 2019, arXiv:1908.10084. What is made from a pretrained model keeps that model's configuration and
    tokenizer in its own checkpoint: to load it again takes neither the folder nor the network.

    Args:
        model: a name of huggingface.co, or a folder with config.json, tokenizer and weights.
        pretrained: start from its weights; else from random ones.
        pool: "mean" of the states of all tokens, or "cls", the first one's.
        max_length: longer texts are cut after so many tokens.
        embedding_size: of the head; None leaves the pooled states as they are.
        frozen: train the head alone, and compute each text's states once (`siamese.frozen.Frozen`).
        layer_decay: each layer learns at this share of the rate of the one above it, above 0 and at most 1 (Howard and Ruder 2018,
            arXiv:1801.06146).
        config: the model's configuration, when it is known already.

    Raises:
        ValueError: no transformers, no such model, a pool that is not known, a length that the model cannot take, nothing to train.
    """

    takes_texts = True
    pretrained_part = "backbone"  # what `encoder.lr` is for: a head is new, and learns at the optimizer's rate

    def __init__(
        self,
        model: str,
        pretrained: bool = True,
        pool: str = "mean",
        max_length: int = 128,
        embedding_size: int | None = None,
        frozen: bool = False,
        layer_decay: float = 1.0,
        config: dict | None = None,
    ):
        super().__init__()
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay={layer_decay} is a share of the learning rate: above 0 and at most 1")
        if frozen and (not embedding_size or layer_decay != 1):
            what = "needs an embedding_size" if not embedding_size else f"knows no layer_decay={layer_decay}"
            raise ValueError(f"frozen=true trains the head alone, which {what}")
        self.backbone = _Pooled(model, pretrained, pool, max_length, config)
        width = self.backbone.model.config.hidden_size
        self.arguments = {"config": self.backbone.config}
        self.lr_factors = {} if layer_decay == 1 else self._decaying(layer_decay)
        if frozen:
            self.backbone = Frozen(self.backbone)
        self.embedding_size = embedding_size or width
        self.head = nn.Linear(width, embedding_size) if embedding_size else nn.Identity()

    def _decaying(self, decay: float) -> dict[str, float]:
        """What the learning rate of each layer, and of what comes before them, is multiplied by, by their dotted names."""
        model = self.backbone.model
        for name, layers in model.named_modules():
            if isinstance(layers, nn.ModuleList) and len(layers) == model.config.num_hidden_layers:
                every = {f"{name}.{layer}": decay ** (len(layers) - 1 - layer) for layer in range(len(layers))}
                for child, part in model.named_children():
                    if child == name.partition(".")[0]:
                        break
                    if list(part.parameters()):
                        every[child] = decay ** len(layers)
                return {f"backbone.model.{part}": factor for part, factor in every.items()}
        raise ValueError(f"layer_decay={decay}: no list of layers is found in {type(model).__name__}, say optimizer.lr_factors instead")

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs))


class _Pooled(nn.Module):
    """Tokens, their states, and one vector of each text: uint8 [B, L] -> [B, F]."""

    def __init__(self, model: str, pretrained: bool, pool: str, max_length: int, config: dict | None):
        super().__init__()
        if pool not in ("mean", "cls"):
            raise ValueError(f"pool={pool} is not known: take mean or cls")
        try:
            from tokenizers import Tokenizer
            from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, logging
        except ImportError:
            raise ValueError("encoders of texts need transformers: run `pip install -e '.[text]'`") from None
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        getLogger("huggingface_hub").setLevel(ERROR)  # each try again, where there is no network
        self.pool, self.max_length, self._make = pool, max_length, Tokenizer.from_str
        if config is not None:  # of a file, which nobody vouches for; the tokenizer comes with the weights
            self.config, self.tokenizer = config, None
            if forbidden := [key for key in config if re.search(_LOADS, key)]:
                raise ValueError(f"its configuration says {forbidden[0]}, which might load something else")
            try:
                known = AutoConfig.for_model(**config)
                if any(isinstance(value, PreTrainedConfig) for value in vars(known).values()) or not hasattr(known, "vocab_size"):
                    raise ValueError("it is of no encoder of texts")
                self.model = AutoModel.from_config(known, trust_remote_code=False)
            except Exception as error:  # what is no configuration raises a dozen things
                raise ValueError(f"its configuration is damaged: {str(error).strip().partition(chr(10))[0][:200]}") from None
        else:
            if (os.path.isabs(model) or model.startswith(".")) and not os.path.isdir(model):
                raise ValueError(f"model={model}: there is no such folder")
            try:
                tokenizer, known = (kind.from_pretrained(model, trust_remote_code=False) for kind in (AutoTokenizer, AutoConfig))
                options = {"trust_remote_code": False}
                self.model = AutoModel.from_pretrained(model, **options) if pretrained else AutoModel.from_config(known, **options)
            except Exception as error:  # the library, and those below it, raise a dozen things
                reason = str(error).strip().partition("\n")[0][:200]
                raise ValueError(
                    f"model={model} cannot be loaded ({reason}): give a folder with a model, or a name of huggingface.co and a network"
                ) from None
            if not tokenizer.is_fast:
                raise ValueError(f"model={model} has a tokenizer in Python alone, which is not supported: take another model")
            if tokenizer.backend_tokenizer.get_vocab_size() <= len(tokenizer.all_special_tokens):  # where it finds none it makes one up
                raise ValueError(f"model={model} comes without a tokenizer that knows any word: tokenizer.json is missing")
            most = min(getattr(known, "max_position_embeddings", None) or max_length, tokenizer.model_max_length)
            if not 2 < max_length <= most:
                raise ValueError(f"max_length={max_length} tokens must be from 3 to the {most} that {model} takes")
            self.config = json.loads(known.to_json_string(use_diff=True))
            for key in [key for key in self.config if key in ("transformers_version", "architectures") or re.search(_LOADS, key)]:
                del self.config[key]
            self.tokenizer = self._make(tokenizer.backend_tokenizer.to_str())
            self.tokenizer.enable_truncation(max_length)
            self.tokenizer.no_padding()
            if known.is_encoder_decoder:
                raise ValueError(f"model={model} is made to write texts, not to embed them: take an encoder, such as BERT")
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # weights that take no part
        self.model.float().eval()
        self.padding = self.model.config.pad_token_id or 0
        if config is None:
            self._try_longest(model, max_length)
        self.model.train()  # as any module starts: `from_pretrained` leaves it in evaluation mode, without dropout

    @torch.no_grad()
    def _try_longest(self, model: str, length: int) -> None:
        # Some models keep places for themselves, so that they take fewer tokens than their configuration says.
        try:
            self.model(input_ids=torch.full((1, length), (self.padding + 1) % self.model.config.vocab_size))
        except (IndexError, RuntimeError):
            raise ValueError(f"max_length={length} tokens are more than {model} takes: lower it by a few") from None

    def get_extra_state(self) -> Tensor:
        """The tokenizer, as bytes of its JSON, so that it is saved among the weights."""
        return torch.frombuffer(bytearray(self.tokenizer.to_str().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        try:
            self.tokenizer = self._make(state.cpu().numpy().tobytes().decode())
        except Exception as error:  # the library raises nothing more exact
            raise ValueError(f"its tokenizer is damaged: {error}") from None

    def forward(self, inputs: Tensor) -> Tensor:
        coded = [torch.tensor(one.ids or [self.padding]) for one in self.tokenizer.encode_batch_fast(as_texts(inputs))]
        lengths = torch.tensor([len(ids) for ids in coded])
        order = lengths.argsort(stable=True)
        pooled = []
        for rows in order.split(_CHUNK):
            tokens = pad_sequence([coded[row] for row in rows.tolist()], batch_first=True, padding_value=self.padding).to(inputs.device)
            known = (torch.arange(tokens.shape[1]) < lengths[rows, None]).to(inputs.device)
            pooled.append(self.pooled(tokens, known))
        return torch.cat(pooled)[order.argsort().to(inputs.device)]

    def pooled(self, tokens: Tensor, known: Tensor) -> Tensor:
        """int64 [B, T] tokens, and bool [B, T] which of them are no padding -> [B, F]."""
        states = self.model(input_ids=tokens, attention_mask=known.long()).last_hidden_state
        weight = known[..., None].to(states.dtype)
        return states[:, 0] if self.pool == "cls" else (states * weight).sum(1) / weight.sum(1).clamp(min=1)


class NGrams(nn.Module):
    """Counts of character n-grams of 3 to 5 bytes, hashed, their square roots: the raw row of texts. uint8 [B, L] -> [B, embedding_size].

    Weinberger et al. 2009, arXiv:0902.2206. Capital letters of ASCII count as small ones.
    """

    takes_texts = True

    def __init__(self, embedding_size: int = 2048):
        super().__init__()
        self.embedding_size = embedding_size

    def forward(self, inputs: Tensor) -> Tensor:
        codes = inputs.long()
        codes = torch.where((codes >= 65) & (codes <= 90), codes + 32, codes)
        codes = nn.functional.pad(codes, (1, 4))
        found = torch.zeros(len(inputs), self.embedding_size + 1, device=inputs.device)
        for n in range(3, 6):
            grams = codes.unfold(1, n, 1)
            hashed = torch.zeros_like(grams[..., 0])
            for place in range(n):
                hashed = (hashed * 1_000_003 + grams[..., place] + 1) % 2_147_483_647
            hashed = hashed * 2_654_435_761 % 2_147_483_647 % self.embedding_size
            empty = (grams[..., 1:] == 0).all(2)  # beyond the text
            found.scatter_add_(1, hashed.masked_fill(empty, self.embedding_size), torch.ones_like(hashed, dtype=found.dtype))
        return found[:, :-1].sqrt()
