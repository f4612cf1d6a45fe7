"""Alignment by visual question answering with pretrained models: images and prompts in, the probability of "yes" out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from mitune import language
from mitune.pixels import Recipe, eight_bit, prepared
from mitune.pretrained import companion, pretrained


class BlipVqa:
    """BLIP-VQA (T2I-CompBench, Huang et al. 2023, Section 4.1): prod_c P(yes | image, "c?") over the noun phrases c of the prompt.

    P(yes) = p(yes) / (p(yes) + p(no)), p the softmax over the decoder's vocabulary at its first token, as BLIP's code in the benchmark takes it
    (models/blip_vqa.py); a question begins with BLIP's own token [ENC] there and here, with [CLS] in transformers' `generate`. Images have the size of
    the weights (the benchmark's: 480 px), both edges resized.
    """

    FAILURES = ("none", "phrase")

    def __init__(self, model, tokenizer, read: language.Reader, *, batch_size: int = 32):
        self.model, self.tokenizer, self.read, self.batch_size = model, tokenizer, read, batch_size
        self._encoding = threading.Lock()  # tokenizers take one thread at a time
        self.recipe = Recipe(model.config.vision_config.image_size, "stretch")
        self.decode, self.encode = model.config.text_config.bos_token_id, model.config.text_config.bos_token_id + 1  # [DEC] and, after it, [ENC]
        self.yes, self.no = tokenizer.convert_tokens_to_ids(["yes", "no"])

    @classmethod
    def load(cls, source: str | Path, read: language.Reader, *, device: str = "cpu", dtype: str = "float32", batch_size: int = 32) -> BlipVqa:
        from transformers import BertTokenizerFast, BlipForQuestionAnswering

        model = pretrained(BlipForQuestionAnswering, source, device=device, dtype=dtype)
        return cls(model, companion(BertTokenizerFast, source), read, batch_size=batch_size)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Products of P(yes) (N,)."""
        return self.assess(images, prompts)[0]

    def assess(self, images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
        """The scores, and "phrase" where BLIP doubts one of a prompt's noun phrases, P(yes) < 0.5, else "none"."""
        answers = self.answers(images, prompts)
        return torch.stack([part.prod() for part in answers]), ["phrase" if bool((part < 0.5).any()) else "none" for part in answers]

    def answers(self, images: torch.Tensor, prompts: Sequence[str]) -> list[torch.Tensor]:
        """P(yes) of each question of each image's prompt; an image is encoded once."""
        asked = [language.questions(self.read(prompt)) for prompt in prompts]
        starts = range(0, len(asked), self.batch_size)
        return [part for n in starts for part in self._answers(images[n : n + self.batch_size], asked[n : n + self.batch_size])]

    @torch.inference_mode()
    def _answers(self, images: torch.Tensor, asked: Sequence[tuple[str, ...]]) -> Sequence[torch.Tensor]:
        model, counts = self.model, [len(questions) for questions in asked]
        texts = [text for questions in asked for text in questions]
        with self._encoding:
            tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=35, return_tensors="pt")
        ids, mask = tokens.input_ids.to(model.device), tokens.attention_mask.to(model.device)
        ids[:, 0] = self.encode
        seen = model.vision_model(pixel_values=prepared(images.to(model.device), self.recipe).to(model.dtype)).last_hidden_state
        seen = seen.repeat_interleave(torch.tensor(counts, device=model.device), dim=0)
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=model.device)
        question = model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=everywhere).last_hidden_state
        start = torch.full((len(ids), 1), self.decode, device=model.device)
        logits = model.text_decoder(input_ids=start, encoder_hidden_states=question, encoder_attention_mask=mask).logits[:, 0].float()
        return torch.sigmoid(logits[:, self.yes] - logits[:, self.no]).cpu().split(counts)


class VqaScore:
    """VQAScore (Lin et al. 2024): P("Yes") as the next token after 'Does this figure show "{prompt}"? Please answer yes or no.', over the whole vocabulary.

    By any image-and-text model of transformers that answers one question of one image, LLaVA 1.5 for one; the paper's own CLIP-FlanT5 is not among them,
    so that scores are not to be mixed with its.
    """

    FAILURES = ("unknown",)

    def __init__(self, model, processor, *, batch_size: int = 16):
        self.model, self.processor, self.batch_size, self._encoding = model, processor, batch_size, threading.Lock()
        processor.tokenizer.padding_side = "right"
        self.yes = processor.tokenizer.encode("Yes", add_special_tokens=False)[0]

    @classmethod
    def load(cls, source: str | Path, *, device: str = "cpu", dtype: str = "float32", batch_size: int = 16) -> VqaScore:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = pretrained(AutoModelForImageTextToText, source, device=device, dtype=dtype)
        return cls(model, companion(AutoProcessor, source), batch_size=batch_size)

    @torch.inference_mode()
    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """P("Yes") (N,)."""
        starts = range(0, len(prompts), self.batch_size)
        return torch.cat([self._score(images[n : n + self.batch_size], prompts[n : n + self.batch_size]) for n in starts])

    def assess(self, images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
        """The scores, and "unknown" of every image: one probability of the whole prompt does not say what is wrong."""
        return self.score(images, prompts), ["unknown"] * len(prompts)

    def _score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        pictures, texts = list(eight_bit(images).cpu().numpy()), [self._asked(prompt) for prompt in prompts]
        with self._encoding:
            inputs = self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        logits = self.model(**inputs.to(self.model.device, self.model.dtype)).logits
        last = inputs["attention_mask"].sum(1) - 1
        return logits[torch.arange(len(last), device=last.device), last].float().softmax(-1)[:, self.yes].cpu()

    def _asked(self, prompt: str) -> str:
        text = f'Does this figure show "{prompt}"? Please answer yes or no.'
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        return self.processor.apply_chat_template(said, add_generation_prompt=True)


class ThreeInOne:
    """T2I-CompBench's score of complex prompts: the mean of BLIP-VQA, 2D-spatial and CLIPScore, the last of the prompt without its adjectives.

    A prompt of the benchmark's list `of_spatial` has no action, and one of `of_action` no relation: there the mean is of the two that it has.
    """

    FAILURES = BlipVqa.FAILURES

    def __init__(
        self, attributes, spatial, action, read: language.Reader, *, of_spatial: frozenset[str] = frozenset(), of_action: frozenset[str] = frozenset()
    ):
        self.attributes, self.spatial, self.action, self.read, self.of_spatial, self.of_action = attributes, spatial, action, read, of_spatial, of_action

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Means (N,)."""
        return self.assess(images, prompts)[0]

    def assess(self, images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
        """The scores, and BLIP-VQA's failures."""
        words = [language.without_adjectives(self.read(prompt)) for prompt in prompts]
        attributes, failures = self.attributes.assess(images, prompts)
        scores = torch.stack([attributes, self.spatial.score(images, prompts), self.action.score(images, words)], 1)
        return torch.stack([row[list(self.parts(prompt))].mean() for row, prompt in zip(scores, prompts, strict=True)]), failures

    def parts(self, prompt: str) -> tuple[int, ...]:
        """Which of the three count: 0 BLIP-VQA, 1 2D-spatial, 2 CLIPScore."""
        if listed(prompt) in self.of_spatial:
            return 0, 1
        return (0, 2) if listed(prompt) in self.of_action else (0, 1, 2)


def listed(prompt: str) -> str:
    """A prompt as the benchmark looks it up in its lists of complex prompts: the first sentence, in small letters."""
    return prompt.split(".")[0].lower()
