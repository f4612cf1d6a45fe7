"""Oracle: the cosine of CLIPModel's own outputs, and open_clip's architecture written with torch's attention."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mitune import networks
from mitune.clip import HPS_FILE, ClipScore, from_open_clip, load_hps
from mitune.pixels import Recipe, prepared

WIDTH, HEADS, PATCH, SIZE = 16, 2, 8, 32
PROMPTS = ["a red circle", "a star", "a red circle", "a blue ring on the left of a star"]


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (4, 3, 40, 40), generator=torch.Generator().manual_seed(0)).float() / 127.5 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIPModel of random weights with GELU, and its tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = networks.build_tokenizer(folder)
    layers = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS, "hidden_act": "gelu", "projection_dim": 12}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = layers | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    config = CLIPConfig(text_config=text, vision_config=layers | {"image_size": SIZE, "patch_size": PATCH}, projection_dim=12)
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


def test_what_is_no_clip_model_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cut, silent, pickled = (shutil.copytree(folder, tmp_path / name) for name in ("cut", "silent", "pickled"))
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-9])
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (silent / name).unlink()
    (pickled / "model.safetensors").unlink()
    torch.save({"any": print}, pickled / "pytorch_model.bin")
    cases = {
        cut: r"cut/model\.safetensors' is not a whole safetensors file \(.*\); delete it and download it again",
        silent: "the tokenizer of .*silent' knows no word",
        pickled: "cannot read CLIPModel from .*: it is a pickle of more than tensors, which can run any code; name a folder",
        folder / "config.json": r"config\.json': that is no folder, and no name on the hub \('owner/name'\)",
        tmp_path / "none": "that is no folder, and no name on the hub",
    }
    for source, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            ClipScore.load(source)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"cannot read HPS_v2\.1_compressed\.pt from .*none': that is no folder"):
        load_hps(tmp_path / "none", folder)


def cosines(scorer, images) -> torch.Tensor:
    """Of CLIPModel's own forward pass, one pair at a time, with transformers' image processor."""
    process, values = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}), []
    for image, prompt in zip(images, PROMPTS, strict=True):
        pixels = process(((image + 1) * 127.5).round().to(torch.uint8).numpy(), return_tensors="pt").pixel_values
        tokens = scorer.tokenizer([prompt], padding="max_length", max_length=scorer.tokenizer.model_max_length, return_tensors="pt")
        with torch.inference_mode():
            output = scorer.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        values.append(F.cosine_similarity(output.image_embeds, output.text_embeds)[0])
    return torch.stack(values)


def test_clipscore_is_the_positive_part_of_clips_own_cosine(folder, images):
    scorer = ClipScore.load(folder, batch_size=3)
    expected = cosines(scorer, images)
    torch.testing.assert_close(scorer.score(images, PROMPTS), expected.clamp(min=0), rtol=0, atol=0.02)  # PIL resizes within two levels of 255
    scorer.model.text_projection.weight.data.neg_()
    torch.testing.assert_close(scorer.score(images, PROMPTS), (-expected).clamp(min=0), rtol=0, atol=0.02)
    assert (expected > 0.05).any() or (expected < -0.05).any()


def test_scores_and_features_do_not_depend_on_the_batch(folder, images):
    scorer = ClipScore.load(folder, batch_size=3)
    alone = torch.cat([scorer.score(images[n : n + 1], PROMPTS[n : n + 1]) for n in range(4)])
    torch.testing.assert_close(scorer.score(images, PROMPTS), alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scorer.features(images).norm(dim=1), torch.ones(4))
    assert set(scorer.assess(images, PROMPTS)[1]) <= set(ClipScore.FAILURES)


# ---------------------------------------------------------------- HPS


def open_clip_state(tokens: int, length: int) -> dict[str, torch.Tensor]:
    """Random tensors by open_clip's names, as an HPS checkpoint has them."""
    generator, state = torch.Generator().manual_seed(1), {}

    def add(name, *shape):
        state[name] = torch.randn(shape, generator=generator) * 0.3

    for tower, n in (("visual.", (SIZE // PATCH) ** 2 + 1), ("", length)):
        for layer in range(2):
            block = f"{tower}transformer.resblocks.{layer}."
            for norm in ("ln_1", "ln_2"):
                add(f"{block}{norm}.weight", WIDTH), add(f"{block}{norm}.bias", WIDTH)
            add(f"{block}attn.in_proj_weight", 3 * WIDTH, WIDTH), add(f"{block}attn.in_proj_bias", 3 * WIDTH)
            add(f"{block}attn.out_proj.weight", WIDTH, WIDTH), add(f"{block}attn.out_proj.bias", WIDTH)
            add(f"{block}mlp.c_fc.weight", 32, WIDTH), add(f"{block}mlp.c_fc.bias", 32)
            add(f"{block}mlp.c_proj.weight", WIDTH, 32), add(f"{block}mlp.c_proj.bias", WIDTH)
        add(f"{tower}positional_embedding", n, WIDTH)
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        add(f"{norm}.weight", WIDTH), add(f"{norm}.bias", WIDTH)
    add("visual.class_embedding", WIDTH), add("visual.conv1.weight", WIDTH, 3, PATCH, PATCH), add("visual.proj", WIDTH, 12)
    add("token_embedding.weight", tokens, WIDTH), add("text_projection", WIDTH, 12), add("logit_scale")
    return state


def tower(state, prefix: str, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """open_clip's residual blocks, x (tokens, width)."""
    for layer in range(2):
        p = {name: state[f"{prefix}transformer.resblocks.{layer}.{name}"] for name in (
            "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
            "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
        )}  # fmt: skip
        attention = torch.nn.MultiheadAttention(WIDTH, HEADS)
        attention.load_state_dict({name.removeprefix("attn."): value for name, value in p.items() if name.startswith("attn.")})
        y = F.layer_norm(x, (WIDTH,), p["ln_1.weight"], p["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = F.layer_norm(x, (WIDTH,), p["ln_2.weight"], p["ln_2.bias"])
        x = x + F.gelu(y @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"]) @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]
    return x


@torch.no_grad()
def open_clip_cosine(state, pixels: torch.Tensor, ids: list[int]) -> float:
    patches = F.conv2d(pixels[None], state["visual.conv1.weight"], stride=PATCH).flatten(2)[0].T
    x = torch.cat([state["visual.class_embedding"][None], patches]) + state["visual.positional_embedding"]
    x = tower(state, "visual.", F.layer_norm(x, (WIDTH,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"]), None)
    image = F.layer_norm(x[0], (WIDTH,), state["visual.ln_post.weight"], state["visual.ln_post.bias"]) @ state["visual.proj"]
    y = state["token_embedding.weight"][ids] + state["positional_embedding"][: len(ids)]
    y = tower(state, "", y, torch.full((len(ids), len(ids)), float("-inf")).triu(1))
    text = F.layer_norm(y[-1], (WIDTH,), state["ln_final.weight"], state["ln_final.bias"]) @ state["text_projection"]
    return float(F.cosine_similarity(image, text, dim=0))


def test_hps_is_open_clips_cosine(folder, images, tmp_path):
    base = ClipScore.load(folder)
    state = open_clip_state(len(base.tokenizer), base.tokenizer.model_max_length)
    torch.save({"state_dict": state}, tmp_path / HPS_FILE)
    scorer = load_hps(tmp_path, folder)
    pixels = prepared(images, Recipe(SIZE, "pad"))
    expected = [open_clip_cosine(state, image, base.tokenizer(prompt).input_ids) for image, prompt in zip(pixels, PROMPTS, strict=True)]
    assert max(expected) > 0.05
    torch.testing.assert_close(scorer.score(images, PROMPTS), torch.tensor(expected).clamp(min=0), rtol=1e-4, atol=1e-5)
    scorer.model.save_pretrained(tmp_path / "converted"), scorer.tokenizer.save_pretrained(tmp_path / "converted")
    torch.testing.assert_close(load_hps(tmp_path / "converted").score(images, PROMPTS), scorer.score(images, PROMPTS))


def test_another_checkpoint_is_refused(folder, tmp_path):
    base = ClipScore.load(folder)
    state = open_clip_state(len(base.tokenizer), base.tokenizer.model_max_length)
    with pytest.raises(ValueError, match=r"does not fit the model: 1 tensors differ, vision_model\.pre_layrnorm\.bias for one"):
        from_open_clip({key: value for key, value in state.items() if key != "visual.ln_pre.bias"}, base.model.state_dict())
    with pytest.raises(ValueError, match="does not fit the model: 1 tensors differ, logit_scale for one"):
        from_open_clip(state | {"logit_scale": torch.zeros(2)}, base.model.state_dict())
    with pytest.raises(ValueError, match=f"{HPS_FILE} is missing in"):
        load_hps(tmp_path, folder)
    (tmp_path / HPS_FILE).write_bytes(b"cut off")
    with pytest.raises(ValueError, match="is not a checkpoint of HPS") as error:
        load_hps(tmp_path, folder)
    assert "\n" not in str(error.value)
