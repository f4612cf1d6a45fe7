"""Oracle: BLIP asked one question at a time through transformers' own image processor and `generate`, and a product and means worked by hand."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForQuestionAnswering,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mitune.language import Sentence
from mitune.vqa import BlipVqa, ThreeInOne, VqaScore

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "yes", "no", "?", "a", "red", "dog", "blue", "old", "cat"]
PROMPTS = ["a red dog and a blue old cat", "a cat", "a dog and a cat and a red cat"]
CHUNKS = dict(zip(PROMPTS, [("a red dog", "a blue old cat"), ("a cat",), ("a dog", "a cat", "a red cat")], strict=True))


def read(prompt: str) -> Sentence:
    return Sentence(prompt, CHUNKS[prompt], ())


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 24, 24), generator=torch.Generator().manual_seed(0)).float() / 127.5 - 1


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """BLIP of random weights, saved and loaded; [DEC] and [ENC] are the two ids after the vocabulary, as in the published weights."""
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": len(WORDS), "vocab_size": len(WORDS) + 2, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
    torch.manual_seed(0)
    text = layers | ids | {"encoder_hidden_size": 16, "projection_dim": 16, "max_position_embeddings": 40}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=layers | {"image_size": 32, "patch_size": 8}, projection_dim=16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    return BlipVqa.load(folder, read, batch_size=2)


def asked_alone(blip, image, question: str) -> float:
    """P(yes) / (P(yes) + P(no)) of one image and one question, by `generate`, whose question begins with [ENC]."""
    pixels = BlipImageProcessorPil(size={"height": 32, "width": 32})(((image + 1) * 127.5).round().to(torch.uint8).numpy(), return_tensors="pt").pixel_values
    ids = torch.tensor([[len(WORDS) + 1, *(WORDS.index(word) for word in question.replace("?", " ?").split()), WORDS.index("[SEP]")]])
    output = blip.model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, do_sample=False)
    probability = output.scores[0][0].softmax(-1)
    yes, no = (float(probability[WORDS.index(word)]) for word in ("yes", "no"))
    return yes / (yes + no)


def test_the_score_is_the_product_over_noun_chunks(blip, images):
    by_hand = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        product = 1.0
        for chunk in CHUNKS[prompt]:
            product *= asked_alone(blip, image, f"{chunk}?")
        by_hand.append(product)
    torch.testing.assert_close(blip.score(images, PROMPTS), torch.tensor(by_hand), rtol=0.02, atol=1e-3)  # PIL resizes within two levels of 255
    assert max(by_hand) - min(by_hand) > 0.05


def test_answers_are_those_of_a_computation_without_padding(blip, images):
    """One image, one question, the networks called by hand; images of the model's own size, so that nothing is resized."""
    small = images[:, :, :8, :8].repeat(1, 1, 4, 4)
    model, ours = blip.model, blip.answers(small, PROMPTS)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in blip.recipe.norm)
    for image, prompt, part in zip(small, PROMPTS, ours, strict=True):
        for chunk, answer in zip(CHUNKS[prompt], part, strict=True):
            ids = torch.tensor([[len(WORDS) + 1, *(WORDS.index(word) for word in chunk.split()), WORDS.index("?"), WORDS.index("[SEP]")]])
            with torch.inference_mode():
                seen = model.vision_model(((image + 1) / 2 - mean)[None] / std).last_hidden_state
                question = model.text_encoder(ids, encoder_hidden_states=seen).last_hidden_state
                logits = model.text_decoder(torch.tensor([[len(WORDS)]]), encoder_hidden_states=question).logits[0, 0]
            yes, no = logits[WORDS.index("yes")].exp(), logits[WORDS.index("no")].exp()
            torch.testing.assert_close(answer, yes / (yes + no), rtol=1e-4, atol=1e-5)


def test_batches_are_one_by_one_and_an_image_is_encoded_once(blip, images, monkeypatch):
    alone = torch.cat([blip.score(images[n : n + 1], PROMPTS[n : n + 1]) for n in range(3)])
    encoded, vision = [], blip.model.vision_model.forward
    monkeypatch.setattr(blip.model.vision_model, "forward", lambda **inputs: encoded.append(len(inputs["pixel_values"])) or vision(**inputs))
    torch.testing.assert_close(blip.score(images, PROMPTS), alone, rtol=1e-4, atol=1e-6)
    assert sum(encoded) == 3


def test_a_doubted_phrase_is_a_failure(blip, images):
    doubted = [bool((part < 0.5).any()) for part in blip.answers(images, PROMPTS)]
    assert blip.assess(images, PROMPTS)[1] == ["phrase" if one else "none" for one in doubted]


# ---------------------------------------------------------------- VQAScore


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    words = ["<pad>", "<unk>", "<image>", "Yes", "Does", "this", "figure", "show", "Please", "answer", "yes", "or", "no", "a", "red", "dog", '"', "?", "."]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<image>"])
    template = "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    crop = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(crop, fast, patch_size=8, vision_feature_select_strategy="default", chat_template=template, num_additional_image_tokens=1)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = layers | {"model_type": "llama", "vocab_size": len(words), "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    vision = layers | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 16}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, vision_feature_layer=-2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return VqaScore.load(folder, batch_size=2)


def test_vqascore_is_the_next_tokens_probability_of_yes(llava, images):
    prompts = ["a red dog", "a dog", "dog"]
    ours = llava.score(images, prompts)
    for image, prompt, score in zip(images, prompts, ours, strict=True):
        text = f'<image> Does this figure show "{prompt}"? Please answer yes or no.'
        inputs = llava.processor(images=[((image + 1) * 127.5).round().to(torch.uint8).numpy()], text=[text], return_tensors="pt")
        output = llava.model.generate(**inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True)
        torch.testing.assert_close(score, output.scores[0][0].softmax(-1)[3], rtol=1e-4, atol=1e-6)
    assert ours.max() - ours.min() > 1e-4
    assert set(llava.assess(images, prompts)[1]) <= set(VqaScore.FAILURES)


# ---------------------------------------------------------------- 3-in-1


class Fixed:
    def __init__(self, *values: float):
        self.values, self.told = torch.tensor(values), None

    def score(self, images, prompts):
        self.told = list(prompts)
        return self.values

    def assess(self, images, prompts):
        return self.score(images, prompts), ["phrase"] * len(prompts)


def test_three_in_one_is_the_mean_of_the_parts_that_a_prompt_has():
    prompts = ["The red cup is near the plate. It is old.", "the dog chases a cat.", "the tall man holds a cup near a door."]

    def parse(prompt):
        return Sentence(prompt, (), tuple((word, "ADJ" if word in ("red", "tall", "old.") else "X") for word in prompt.split()))

    attributes, spatial, action = Fixed(0.2, 0.4, 0.6), Fixed(0.8, 0.9, 0.0), Fixed(0.1, 0.2, 0.3)
    scorer = ThreeInOne(attributes, spatial, action, parse, of_spatial={"the red cup is near the plate"}, of_action={"the dog chases a cat"})
    torch.testing.assert_close(scorer.score(torch.zeros(3, 3, 8, 8), prompts), torch.tensor([0.5, 0.3, 0.3]))
    assert action.told[2] == "the man holds a cup near a door." and attributes.told == prompts
    assert scorer.assess(torch.zeros(3, 3, 8, 8), prompts)[1] == ["phrase"] * 3
    assert ThreeInOne(attributes, spatial, action, parse).score(torch.zeros(3, 3, 8, 8), prompts)[0] == pytest.approx((0.2 + 0.8 + 0.1) / 3)


def test_threads_do_not_disturb_each_other(blip, images):
    """`shards` calls a judge from several threads at once."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: blip.score(images[n % 3 :], PROMPTS[n % 3 :]), range(12)))
    for n, scores in enumerate(found):
        torch.testing.assert_close(scores, blip.score(images[n % 3 :], PROMPTS[n % 3 :]), rtol=1e-4, atol=1e-6)
