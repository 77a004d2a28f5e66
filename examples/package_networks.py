"""Networks of seven packages, small and with random weights: what `networks.py --packages` asks."""

from __future__ import annotations

from typing import Any

import package_network as calls
from package_network import Network
from torch import nn

__all__ = ["NETWORKS"]

WINDOWS = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)}
ENLARGING = {"upscale": 2, "upsampler": "pixelshuffle"}


def spandrel(name: str, size: int = 64, use: calls.Use | None = None, **options: Any) -> Network:
    module, _, kind = name.partition(":")
    kind = kind or module
    shape = (1, 3, size, size)
    return Network(f"spandrel/{kind}", f"spandrel.architectures.{module}:{kind}", shape, options, use)


RESTORATION = (
    spandrel("ATD", **WINDOWS, **ENLARGING, window_size=8, category_size=64, num_tokens=16),
    spandrel("CRAFT", embed_dim=24, depths=[1, 1], num_heads=[2, 2], upscale=2),
    spandrel("Compact", num_feat=16, num_conv=4),
    spandrel("DAT", embed_dim=24, depth=[2, 2], num_heads=[2, 2], split_size=[8, 16]),
    spandrel("DCTLSA", nf=20),
    spandrel("DITN", dim=16, ITL_blocks=1, SAL_blocks=1),
    spandrel("DRCT", **WINDOWS, **ENLARGING, window_size=16, gc=8),
    spandrel("DRUNet", in_nc=3, out_nc=3, nc=[8, 16, 16, 32], nb=1),
    spandrel("DnCNN", in_nc=3, out_nc=3, nc=16, nb=5),
    spandrel("ESRGAN", num_filters=16, num_blocks=2),
    spandrel("FDAT", embed_dim=24, num_groups=1, depth_per_group=2, num_heads=2),
    spandrel("FFTformer", dim=16, num_blocks=[1, 1, 1], num_refinement_blocks=1),
    spandrel(
        "GFPGAN",
        out_size=64,
        num_style_feat=32,
        channel_multiplier=1,
        narrow=0.25,
        num_mlp=2,
        use=calls.without_noise,
    ),
    spandrel(
        "GRL",
        **ENLARGING,
        embed_dim=24,
        depths=[2],
        num_heads_window=[2],
        num_heads_stripe=[2],
        stripe_size=[8, 16],
    ),
    spandrel("HAT", **WINDOWS, **ENLARGING, window_size=16, squeeze_factor=6),
    spandrel("HVICIDNet", channels=[8, 8, 16, 32]),
    spandrel("KBNet:KBNet_l", dim=48, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1),
    spandrel("KBNet:KBNet_s", width=16, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
    spandrel("IPT", patch_size=64, patch_dim=4, n_feats=8, scale=[2], num_heads=2, num_layers=1),
    spandrel("MixDehazeNet", embed_dims=[8, 16, 32, 16, 8], depths=[1, 1, 1, 1, 1]),
    spandrel("MoESR", dim=16, n_blocks=2, n_block=1),
    spandrel("MoSR", dim=16, n_block=2),
    spandrel("NAFNet", width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
    spandrel("OmniSR", num_feat=16, res_num=1),
    spandrel("PLKSR:PLKSR", dim=16, n_blocks=2),
    spandrel("PLKSR:RealPLKSR", dim=16, n_blocks=2),
    spandrel("RCAN", n_resgroups=1, n_resblocks=2, n_feats=16),
    spandrel("RGT", embed_dim=24, depth=[2, 2], num_heads=[2, 2]),
    spandrel("RealCUGAN:UpCunet2x"),
    spandrel(
        "RestoreFormer",
        n_embed=32,
        embed_dim=32,
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        z_channels=32,
        head_size=4,
    ),
    spandrel("RetinexFormer", n_feat=8, stage=1),
    spandrel("SAFMN", dim=16, n_blocks=2),
    spandrel("SAFMNBCIE", dim=16, n_blocks=1, num_layers=1),
    spandrel("SCUNet", config=[2] * 7, dim=64),
    spandrel("SPAN", num_in_ch=3, num_out_ch=3, feature_channels=16),
    spandrel("SeemoRe", num_experts=3, num_layers=2, embedding_dim=16),
    spandrel("SwiftSRGAN", num_channels=16, num_blocks=2),
    spandrel("Swin2SR", **WINDOWS, **ENLARGING, window_size=8),
    spandrel("SwinIR", **WINDOWS, **ENLARGING, window_size=8),
    spandrel("Uformer", size=128, embed_dim=8, depths=[1] * 9),
)


def smp(kind: str, encoder: str = "tu-test_resnet", size: int = 192, batch: int = 1, **options: Any) -> Network:
    name = " ".join(["smp/" + kind, encoder, *map(str, options.values())])
    options |= {"encoder_name": encoder, "encoder_weights": None}
    return Network(name, f"segmentation_models_pytorch:{kind}", (batch, 3, size, size), options)


SEGMENTATION = (
    smp("DPT", "tu-test_vit", size=160),
    *map(smp, ("FPN", "Linknet", "MAnet", "UnetPlusPlus", "Unet")),
    *(smp(kind, batch=2) for kind in ("DeepLabV3", "DeepLabV3Plus", "PAN", "PSPNet", "UPerNet")),
    smp("Segformer", "mit_b0"),
    smp("Unet", decoder_attention_type="scse"),
    *(smp("Unet", encoder) for encoder in ("resnet18", "mobilenet_v2", "efficientnet-b0", "mobileone_s0")),
    *(smp("Linknet", encoder) for encoder in ("tu-test_efficientnet", "tu-test_convnext", "tu-test_byobnet")),
)

ENDS = {"in_channels": 1, "out_channels": 2}
LEVELS = {"channels": (8, 16, 32), "strides": (2, 2)}
KERNELS = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [8, 16, 32]}
TOKENS = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2}
CODED = {"in_channels": 1, "out_channels": 1, "channels": (8, 16), "num_res_blocks": 1, "norm_num_groups": 4}
ATTENDING = {**CODED, "attention_levels": (False, True)}
WIDTHS = {"features": (8, 8, 16, 32, 32, 8)}


def monai(kind: str, *extents: int, planes: int = 1, use: calls.Use | None = None, **options: Any) -> Network:
    name = f"monai/{kind} {len(extents)}-D"
    return Network(name, f"monai.networks.nets:{kind}", (1, planes, *extents), options, use)


def monai_of(dims: int, extent: int, few: int) -> tuple[Network, ...]:
    extents, fewer, even = (extent,) * dims, (few,) * dims, (64,) * dims
    of = {"spatial_dims": dims, **ENDS}
    return (
        monai("UNet", *extents, **of, **LEVELS, num_res_units=2),
        monai("BasicUNet", *extents, **of, **WIDTHS),
        monai("BasicUNetPlusPlus", *extents, **of, **WIDTHS, use=calls.item(0)),
        monai("AttentionUnet", *extents, **of, **LEVELS),
        monai("DynUNet", *extents, **of, **KERNELS, res_block=True),
        monai("SegResNet", *extents, **of),
        monai("SegResNetDS", *extents, **of, init_filters=8),
        monai("HighResNet", *extents, **of),
        monai("MedNeXt", *extents, **of, init_filters=8),
        monai("SwinUNETR", *even, **of, feature_size=12),
        monai("UNETR", *even, **of, **TOKENS, img_size=even, feature_size=8),
        monai("AutoencoderKL", *fewer, spatial_dims=dims, **ATTENDING, use=calls.reconstructed_plainly),
        monai(
            "DiffusionModelUNet", *fewer, spatial_dims=dims, **ATTENDING, num_head_channels=8, use=calls.at_step
        ),
    )


MEDICAL = (
    *monai_of(2, 128, 64),
    *monai_of(3, 48, 24),
    monai("VNet", 128, 128, spatial_dims=2),
    monai("DenseNet121", 64, 64, 64, spatial_dims=3, **ENDS, init_features=16, growth_rate=8),
    monai("EfficientNetBN", 128, 128, planes=3, model_name="efficientnet-b0", pretrained=False),
    monai("FlexibleUNet", 128, 128, planes=3, in_channels=3, out_channels=2, backbone="efficientnet-b0"),
    monai("Quicknat", 128, 128, num_filters=8, num_classes=2),
    monai("RegUNet", 64, 64, 64, spatial_dims=3, in_channels=1, num_channel_initial=8, depth=2),
    monai("LocalNet", 64, 64, 64, spatial_dims=3, in_channels=1, num_channel_initial=8, extract_levels=(0, 1)),
    monai("PatchDiscriminator", 128, 128, spatial_dims=2, channels=8, in_channels=1, use=calls.item(-1)),
    monai(
        "ViTAutoEnc", 64, 64, 64, in_channels=1, img_size=(64,) * 3, patch_size=16, hidden_size=192, mlp_dim=768,
        num_heads=4, num_layers=2, use=calls.item(0),
    ),
    monai(
        "VQVAE", 128, 128, spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16),
        num_res_channels=(8, 16), num_res_layers=1, downsample_parameters=((2, 4, 1, 1),) * 2,
        upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        embedding_dim=8, use=calls.item(0),
    ),
)  # fmt: skip

PLANNED: dict[str, Any] = {
    "input_channels": 1, "n_stages": 4, "features_per_stage": (8, 16, 32, 32), "kernel_sizes": 3,
    "strides": (1, 2, 2, 2), "num_classes": 3, "n_conv_per_stage_decoder": (1, 1, 1), "conv_bias": True,
    "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True},
}  # fmt: skip
FLAT = {"conv_op": nn.Conv2d, "norm_op": nn.InstanceNorm2d}
SOLID = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d}


def dynamic(place: str, *shape: int, **options: Any) -> Network:
    name = f"dynamic_network_architectures/{place.partition(':')[2]} {len(shape) - 2}-D"
    return Network(name, f"dynamic_network_architectures.architectures.{place}", shape, options)


NNUNETS = (
    dynamic("unet:PlainConvUNet", 1, 1, 128, 128, **PLANNED, **FLAT, n_conv_per_stage=2),
    dynamic("unet:PlainConvUNet", 1, 1, 48, 48, 48, **PLANNED, **SOLID, n_conv_per_stage=2),
    dynamic("unet:ResidualEncoderUNet", 1, 1, 128, 128, **PLANNED, **FLAT, n_blocks_per_stage=2),
    dynamic("unet:ResidualEncoderUNet", 1, 1, 48, 48, 48, **PLANNED, **SOLID, n_blocks_per_stage=2),
    dynamic("unet:ResidualUNet", 1, 1, 48, 48, 48, **PLANNED, **SOLID, n_blocks_per_stage=2),
    dynamic("resnet:ResNet18", 1, 3, 256, 256, n_classes=4),
)  # fmt: skip


def compression(kind: str, **options: Any) -> Network:
    return Network(f"compressai/{kind}", f"compressai.models:{kind}", (1, 3, 128, 128), options, calls.likelihoods)


COMPRESSION = (
    compression("FactorizedPrior", N=16, M=24),
    compression("FactorizedPriorReLU", N=16, M=24),
    compression("ScaleHyperprior", N=16, M=24),
    compression("MeanScaleHyperprior", N=16, M=24),
    compression("JointAutoregressiveHierarchicalPriors", N=16, M=24),
    compression("Cheng2020Anchor", N=16),
    compression("Cheng2020Attention", N=16),
    compression("Cheng2020AnchorCheckerboard", N=16),
    compression("Elic2022Official", N=16, M=320),
)

SMALL: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
CODING = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
LEARNED = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
READING = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
READING_3D = {
    "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
    "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
}
TEXT = {"cross_attention_dim": 8, "attention_head_dim": 4}
VIDEO = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
EFFICIENT = ("ResBlock", "ResBlock", "EfficientViTBlock")
IMAGE, LATENT, LATENT_VIDEO = (1, 3, 64, 64), (1, 4, 32, 32), (1, 4, 2, 8, 8)


def diffusers(kind: str, shape: tuple[int, ...], use: calls.Use, **options: Any) -> Network:
    return Network(f"diffusers/{kind}", f"diffusers:{kind}", shape, options, use)


GENERATION = (
    diffusers("AutoencoderKL", IMAGE, calls.reconstructed, **SMALL, **CODING),
    diffusers("AutoencoderKLFlux2", IMAGE, calls.reconstructed, **SMALL, **CODING),
    diffusers(
        "AutoencoderKLTemporalDecoder", IMAGE, calls.encoded, block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
    ),
    diffusers("VQModel", IMAGE, calls.attribute("sample"), **SMALL, **CODING, num_vq_embeddings=16),
    diffusers(
        "AsymmetricAutoencoderKL", IMAGE, calls.reconstructed, **CODING, norm_num_groups=4,
        down_block_out_channels=(16, 32), up_block_out_channels=(16, 32),
    ),
    diffusers(
        "AutoencoderTiny", IMAGE, calls.attribute("sample"), encoder_block_out_channels=(16,) * 4,
        decoder_block_out_channels=(16,) * 4,
    ),
    diffusers(
        "AutoencoderDC", IMAGE, calls.reconstructed_plainly, attention_head_dim=8, latent_channels=8,
        encoder_block_out_channels=(16, 32, 32), decoder_block_out_channels=(16, 32, 32),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_block_types=EFFICIENT, decoder_block_types=EFFICIENT,
        encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
    ),
    diffusers(
        "AutoencoderKLHunyuanImage", IMAGE, calls.reconstructed, in_channels=3, out_channels=3, latent_channels=8,
        block_out_channels=(32, 32, 64), layers_per_block=1, spatial_compression_ratio=4, sample_size=64,
    ),
    diffusers("AutoencoderKLCogVideoX", LATENT_VIDEO, calls.decoded, **VIDEO),
    diffusers("AutoencoderKLHunyuanVideo", LATENT_VIDEO, calls.decoded, **VIDEO),
    diffusers("AutoencoderKLMagvit", LATENT_VIDEO, calls.decoded, **VIDEO),
    diffusers(
        "AutoencoderKLHunyuanVideo15", LATENT_VIDEO, calls.decoded, latent_channels=4, layers_per_block=1,
        block_out_channels=(8, 16, 16, 32, 32),
    ),
    diffusers(
        "AutoencoderKLMochi", LATENT_VIDEO, calls.decoded, latent_channels=4, layers_per_block=(1,) * 5,
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
    ),
    diffusers("AutoencoderKLWan", (1, 4, 3, 8, 8), calls.decoded, **WAN),
    diffusers("AutoencoderKLQwenImage", (1, 4, 1, 16, 16), calls.decoded, **WAN),
    diffusers(
        "AutoencoderKLLTXVideo", (1, 8, 2, 4, 4), calls.decoded, latent_channels=8, layers_per_block=(1,) * 5,
        block_out_channels=(16, 32, 32, 32), decoder_block_out_channels=(16, 32, 32, 32),
        decoder_layers_per_block=(1,) * 5,
    ),
    diffusers(
        "AutoencoderKLCosmos", LATENT_VIDEO, calls.decoded, latent_channels=4, num_layers=1,
        encoder_block_out_channels=(8, 16, 16), decode_block_out_channels=(16, 16, 16),
    ),
    diffusers(
        "AutoencoderOobleck", (1, 2, 4096), calls.reconstructed, encoder_hidden_size=8, decoder_channels=8,
        decoder_input_channels=4, downsampling_ratios=[2, 4, 4], channel_multiples=[1, 2, 4],
    ),
    diffusers("UNet2DModel", IMAGE, calls.sampled_at_step, **SMALL, **LEARNED),
    diffusers("UNet2DConditionModel", LATENT, calls.with_text, **SMALL, **READING, **TEXT),
    diffusers("UNet3DConditionModel", (1, 4, 4, 32, 32), calls.with_text, **SMALL, **READING_3D, **TEXT),
    diffusers(
        "DiTTransformer2DModel", LATENT, calls.of_class, num_attention_heads=2, attention_head_dim=8,
        out_channels=8, num_layers=1, num_embeds_ada_norm=10,
    ),
)  # fmt: skip

HIDDEN, LOGITS = calls.attribute("last_hidden_state"), calls.attribute("logits")
PYRAMID = {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}
HEADS = {"num_attention_heads": [1, 2, 4, 4]}
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}


def transformers(
    kind: str, task: str = "Model", use: calls.Use = HIDDEN, size: int = 128, batch: int = 1, **options: Any
) -> Network:
    name, shape = f"{kind}{task}", (batch, 3, size, size)
    return Network(f"transformers/{name}", f"transformers:{name}", shape, options, use, f"{kind}Config")


TRANSFORMERS = (
    transformers("Segformer", "ForSemanticSegmentation", LOGITS, **PYRAMID, **HEADS, decoder_hidden_size=32),
    transformers("PvtV2", **PYRAMID, **HEADS),
    transformers("Pvt", size=224, **PYRAMID, **HEADS),
    transformers("Swin", size=224, embed_dim=24, depths=[2, 2], num_heads=[2, 2]),
    transformers("Swinv2", size=256, embed_dim=24, depths=[2, 2], num_heads=[2, 2], image_size=256, window_size=8),
    transformers(
        "Swin2SR", "ForImageSuperResolution", calls.attribute("reconstruction"), size=64, embed_dim=24,
        depths=[2, 2], num_heads=[2, 2], image_size=64,
    ),
    transformers("ConvNext", **PYRAMID),
    transformers("ConvNextV2", **PYRAMID),
    transformers("ResNet", embedding_size=16, **PYRAMID),
    transformers("RegNet", embedding_size=16, groups_width=16, **PYRAMID),
    transformers("PoolFormer", **PYRAMID),
    transformers("FocalNet", embed_dim=16, depths=[1, 1, 1, 1]),
    transformers("MobileNetV1", depth_multiplier=0.25),
    transformers("MobileNetV2", depth_multiplier=0.35),
    transformers("MobileViT", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64]),
    transformers("MobileViTV2", width_multiplier=0.25),
    transformers("EfficientNet", width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320),
    transformers("Levit", size=224, batch=2, hidden_sizes=[32, 48, 64]),  # torch's gradients of one are wrong
    transformers("SwiftFormer", embed_dims=[16, 32, 48, 64], depths=[1, 1, 1, 1]),
    transformers("ViT", size=224, **VIT),
    transformers("Dinov2", size=224, **VIT),
    transformers("Beit", size=224, **VIT),
    transformers("VitDet", size=224, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2),
    transformers("Hiera", size=224, embed_dim=16, depths=[1, 1, 1, 1]),
    transformers(
        "DPT", "ForDepthEstimation", calls.attribute("predicted_depth"), size=384, **VIT,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 16, 16, 16], fusion_hidden_size=16,
    ),
)  # fmt: skip

NETWORKS = (*RESTORATION, *SEGMENTATION, *MEDICAL, *NNUNETS, *COMPRESSION, *GENERATION, *TRANSFORMERS)
