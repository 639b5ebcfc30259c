import math

import pytest
import torch
from torch import nn

from vargen.errors import CheckpointError, ConfigError, VargenError
from vargen.losses.distillation import TeacherTerm, VisionTeacher, agreement, load_teacher
from vargen.losses.objective import TokenizerObjective
from vargen.model import TokenizerOutput
from vargen.tokenizers.titok import TiTok
from vargen.tokenizers.titok_vqgan import MaskGITVQGAN

VQGAN = {"image_size": 16, "widths": [8, 8, 16], "num_blocks": 1, "latent_channels": 6, "codebook_size": 12, "norm_groups": 4}
FIRST_STAGE = {
    "image_size": 16,
    "patch_size": 4,
    "num_tokens": 4,
    "channels": 6,
    "encoder_dim": 32,
    "encoder_depth": 1,
    "encoder_heads": 2,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "codebook_size": 16,
    "proxy_codes": 12,
}


def test_agreement_of_features():
    student = torch.randn(2, 3, 3, 5, generator=torch.Generator().manual_seed(0))
    assert agreement(student, 3 * student) < 1e-6
    assert agreement(student, -student) == pytest.approx(2, abs=1e-6)
    assert agreement(student, student + 2, "l2") == pytest.approx(4)
    vector = student.flatten(1, 2).mean(1)
    assert agreement(student, vector) < 1e-6
    constant = torch.ones(2, 7, 7, 5)
    assert agreement(torch.ones(2, 3, 3, 5), constant) < 1e-6
    with pytest.raises(VargenError, match="5 channels for a teacher of 4"):
        agreement(student, torch.ones(2, 3, 3, 4))


def test_agreement_of_codes():
    ids = torch.randint(0, 6, (2, 3, 3))
    assert agreement(torch.zeros(2, 3, 3, 6), ids) == pytest.approx(math.log(6))
    assert agreement(100 * torch.nn.functional.one_hot(ids, 6).float(), ids) < 1e-6
    with pytest.raises(VargenError, match="grid"):
        agreement(torch.zeros(2, 4, 4, 6), ids)


def test_first_stage_of_titok_learns_the_codes_of_a_tokenizer(tmp_path):
    torch.manual_seed(0)
    MaskGITVQGAN(**VQGAN).save_pretrained(tmp_path)
    student = TiTok(**FIRST_STAGE).train()
    teachers = [{"features": "code_logits", "teacher": str(tmp_path), "weight": 2.0}]
    objective = TokenizerObjective(teachers=teachers).train()
    assert objective.discriminator_parameters() == []
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    history = []
    for step in range(12):
        losses = objective.generator_losses(pixels, student(pixels), step)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append(losses["code_logits"].item())
    expected = 2 * losses["code_logits"] + losses["codebook"] + losses["commitment"]
    assert torch.allclose(losses["loss"], expected)
    assert history[-1] < 0.7 * history[0]
    assert all(p.grad is None for p in objective.parameters())


def test_teacher_stays_in_evaluation_mode_and_its_name_must_exist():
    term = TeacherTerm("semantic", nn.Dropout(0.9)).train()
    assert not term.teacher.training
    output = TokenizerOutput(torch.zeros(1), None, features={"latents": torch.zeros(1, 2), "dead_codes": torch.tensor(1.0)})
    with pytest.raises(ConfigError, match="no features 'semantic' for a teacher; it returns: latents"):
        term(torch.zeros(1, 3, 8, 8), output)
    with pytest.raises(ConfigError, match="expected one of cosine, l2"):
        TeacherTerm("semantic", nn.Identity(), distance="cos")
    with pytest.raises(ConfigError, match="teachers"):
        TokenizerObjective(teachers=[{"feature": "semantic"}])


def test_vision_model_of_transformers(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    transformers.BitImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, image_size=42)
    assert isinstance(teacher, VisionTeacher)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    features = teacher(pixels)
    assert features.shape == (2, 6, 6, 16)
    resized = nn.functional.interpolate((pixels + 1) / 2, (42, 42), mode="bicubic", antialias=True)
    hidden = teacher.model(pixel_values=(resized - 0.5) / 0.25).last_hidden_state
    assert torch.allclose(features.flatten(1, 2), hidden[:, 1:], atol=1e-5)
    with pytest.raises(ConfigError, match="such as 35"):
        load_teacher(tmp_path, image_size=30)
    with pytest.raises(CheckpointError, match="neither a model of ours nor a vision model"):
        load_teacher(tmp_path / "absent")
