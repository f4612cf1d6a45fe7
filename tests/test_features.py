"""Oracle: transformers' own outputs of the same pixels, a TorchScript network that can be computed by hand, closed forms and the naive loop of quality."""

import json
import math
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from mitune import config, features, fidelity
from mitune.pixels import CLIP, IMAGENET

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # TorchScript is how the network is published
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Channels(torch.nn.Module):
    """In the place of Inception: the means of the red and the green channel, of pixels of 8 bits."""

    def forward(self, image: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert image.dtype == torch.uint8 and return_features
        return image.float().mean([2, 3])[:, :2]


def normal(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    torch.jit.script(Channels()).save(folder / features.INCEPTION_FILE)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    vision, text = LAYERS | {"image_size": 16, "patch_size": 8}, LAYERS | {"vocab_size": 10, "max_position_embeddings": 8, "eos_token_id": 9, "bos_token_id": 8}
    normal(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of images: 13 and 11, of several sizes."""
    generator, made = np.random.default_rng(0), []
    for name, n, low in (("ours", 13, 0), ("reference", 11, 60)):
        made.append(tmp_path_factory.mktemp(name))
        for i in range(n):
            size = (16, 16) if i % 2 else (20, 24)
            colour = generator.integers(low, 256, 3)
            Image.fromarray(np.clip(colour + generator.integers(-9, 10, (*size, 3)), 0, 255).astype(np.uint8)).save(made[-1] / f"{i:02}.png")
    return made


def pixels(folder) -> list[np.ndarray]:
    return [np.array(Image.open(file)) for file in sorted(folder.glob("*.png"))]


def normalised(array: np.ndarray, norm) -> torch.Tensor:
    return ((torch.from_numpy(array).permute(2, 0, 1) / 255 - torch.tensor(norm[0]).view(3, 1, 1)) / torch.tensor(norm[1]).view(3, 1, 1))[None]


def test_dinov2_is_the_class_token_after_the_last_norm(tmp_path):
    config_ = Dinov2Config(**{key: value for key, value in LAYERS.items() if key != "intermediate_size"}, image_size=28, patch_size=14)
    normal(Dinov2Model(config_)).save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    extractor = features.dinov2(tmp_path)
    with torch.inference_mode():
        expected = Dinov2Model.from_pretrained(tmp_path)(normalised(image, IMAGENET)).pooler_output
    ours = extractor.features(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_clip_is_the_unit_norm_embedding(clip):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    with torch.inference_mode():
        model = CLIPModel.from_pretrained(clip)
        expected = model(input_ids=torch.tensor([[1, 9]]), pixel_values=normalised(image, CLIP)).image_embeds
    torch.testing.assert_close(features.clip(clip).features(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1), expected, rtol=1e-4, atol=1e-5)


def test_a_list_of_images_of_several_sizes_is_a_batch(inception, clip, folders):
    for extractor in (features.inception(inception, batch_size=3), features.clip(clip, batch_size=3)):
        images = [torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1 for array in pixels(folders[0])]
        alone = torch.cat([extractor.features(image[None]) for image in images])
        torch.testing.assert_close(extractor.features(images), alone, rtol=1e-4, atol=1e-5)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "root", lambda: tmp_path)
    return tmp_path


def test_fid_of_two_folders_is_the_formula(project, inception, folders):
    """In two dimensions tr sqrt(A B) = sqrt(tr A B + 2 sqrt(det A det B))."""
    x, y = (np.array([array.mean((0, 1))[:2] for array in pixels(folder)]) for folder in folders)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert fidelity.fidelity("fid", *folders, weights=str(inception)) == pytest.approx(expected, rel=1e-4)


def test_cmmd_of_two_folders_is_a_double_loop(project, clip, folders):
    extractor = features.clip(clip)
    x, y = (
        torch.cat([extractor.features(torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1) for array in pixels(folder)]).double().numpy()
        for folder in folders
    )

    def mean(pairs):
        values = [math.exp(-((p - q) ** 2).sum() / 200) for p, q in pairs]
        return sum(values) / len(values)

    apart = [mean((p, q) for i, p in enumerate(part) for j, q in enumerate(part) if i != j) for part in (x, y)]
    expected = 1000 * (sum(apart) - 2 * mean((p, q) for p in x for q in y))
    assert fidelity.fidelity("cmmd", *folders, weights=str(clip)) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_reference_is_computed_once_for_its_contents(project, inception, folders, monkeypatch):
    read, original = [], fidelity._read
    monkeypatch.setattr(fidelity, "_read", lambda file: read.append(file) or original(file))
    first = fidelity.fidelity("fid", *folders, weights=str(inception))
    assert len(read) == 1 + 13 + 11  # the first tells how many features an image has
    assert fidelity.fidelity("fid", *folders, weights=str(inception)) == first and len(read) == 1 + 13 + 11 + 1 + 13


def test_too_few_images_are_told_by_the_first(project, inception, folders, monkeypatch):
    few, read, original = project / "few", [], fidelity._read
    few.mkdir()
    for file in sorted(folders[0].glob("*.png"))[:9]:
        (few / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(fidelity, "_read", lambda file: read.append(file) or original(file))
    with pytest.raises(ValueError, match="9 images are too few for fid, which takes 10, 5 a feature: give more, or use cmmd"):
        fidelity.fidelity("fid", folders[0], few, weights=str(inception))
    assert len(read) == 1


def test_the_reference_can_be_packed(project, clip, folders):
    """MS-COCO-2014 as its zip file has it; the oracle is the folder of the same images."""
    (project / "coco" / "annotations").mkdir(parents=True)
    files = sorted(folders[1].glob("*.png"))
    with zipfile.ZipFile(project / "coco" / "val2014.zip", "w") as archive:
        for file in files:
            archive.write(file, f"val2014/{file.name}")
    found = {"images": [{"id": n, "file_name": file.name} for n, file in enumerate(files)]}
    found["annotations"] = [{"image_id": n, "id": n, "caption": "a"} for n in range(len(files))]
    (project / "coco" / "annotations" / "captions_val2014.json").write_text(json.dumps(found))
    assert fidelity.fidelity("cmmd", folders[0], project / "coco", weights=str(clip)) == fidelity.fidelity("cmmd", *folders, weights=str(clip))


def test_bad_input_is_one_line(project, inception, folders, capsys):
    (project / "empty").mkdir(), (project / "broken").mkdir()
    (project / "broken" / "a.png").write_text("no image")
    (project / "broken.pt").write_text("no network")
    cases = {
        ("cmmd", project / "empty", str(inception)): "has no image",
        ("fid", project / "broken", str(inception)): r"a\.png is not an image",
        ("fid", folders[0], str(project / "broken.pt")): "is not TorchScript",
        ("fid", folders[0], None): r"fid takes the network of its file inception-2015-12-05\.pt: give it as --weights",
        ("fid", folders[0], str(project)): "inception-2015-12-05.pt is missing in",
        ("fd-dinov2", folders[0], str(inception)): "cannot read Dinov2Model from",
    }
    for (measure, folder, weights), message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            fidelity.fidelity(measure, folder, folder, weights=weights)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="unknown device 'gpu'; choose cpu"):
        fidelity.fidelity("fid", *folders, weights=str(inception), device="gpu")
    with pytest.raises(SystemExit, match=r"mitune: .* has no image"):
        fidelity.main([str(project / "empty"), str(project / "empty"), "--measure", "fid", "--weights", str(inception)])
    fidelity.main([str(folders[0]), str(folders[0]), "--measure", "fid", "--weights", str(inception)])
    assert capsys.readouterr().out.split()[0] == "fid"
