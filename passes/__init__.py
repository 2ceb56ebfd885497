"""The built-in passes, one file per pass; a file has the name of its pass, with underscores."""

PASSES = {
    name: f"planish.passes.{family}.{name.replace('-', '_')}:{cls}"
    for family, name, cls in (
        ("cleanup", "deduplicate-initializers", "DeduplicateInitializers"),
        ("cleanup", "eliminate-common-subexpressions", "EliminateCommonSubexpressions"),
        ("cleanup", "eliminate-identities", "EliminateIdentities"),
        ("cleanup", "fold-constants", "FoldConstants"),
        ("cleanup", "merge-moves", "MergeMoves"),
        ("cleanup", "remove-unused-nodes", "RemoveUnusedNodes"),
        ("cleanup", "simplify-shapes", "SimplifyShapes"),
        ("cleanup", "specialize-shapes", "SpecializeShapes"),
        ("cleanup", "unmerge-batches", "UnmergeBatches"),
        ("fusion", "fuse-attention", "FuseAttention"),
        ("fusion", "fuse-gelu", "FuseGelu"),
        ("fusion", "fuse-layer-norm", "FuseLayerNorm"),
        ("fusion", "fuse-rms-norm", "FuseRmsNorm"),
        ("fusion", "fuse-rotary-embedding", "FuseRotaryEmbedding"),
        ("fusion", "pack-projections", "PackProjections"),
        ("fusion", "share-key-heads", "ShareKeyHeads"),
        ("fusion", "simplify-masks", "SimplifyMasks"),
        ("fusion", "unfuse-gemm", "UnfuseGemm"),
        ("legalize", "legalize-onnxruntime", "LegalizeOnnxRuntime"),
        ("legalize", "legalize-openvino", "LegalizeOpenVino"),
        ("legalize", "legalize-tensorrt", "LegalizeTensorRt"),
        ("legalize", "use-matmul-integer-to-float", "UseMatMulIntegerToFloat"),
        ("legalize", "use-matmul-nbits", "UseMatMulNBits"),
        ("memory", "order-for-memory", "OrderForMemory"),
        ("memory", "share-transposed-weights", "ShareTransposedWeights"),
        ("pruning", "prune-ffn", "PruneFfn"),
        ("pruning", "remove-padding", "RemovePadding"),
        ("quantization", "convert-float16", "ConvertFloat16"),
        ("quantization", "quantize-cache", "QuantizeCache"),
        ("quantization", "quantize-embeddings", "QuantizeEmbeddings"),
        ("quantization", "quantize-float8", "QuantizeFloat8"),
        ("quantization", "quantize-int8", "QuantizeInt8"),
        ("quantization", "quantize-weights", "QuantizeWeights"),
        ("quantization", "rotate-residual", "RotateResidual"),
        ("quantization", "smooth-activations", "SmoothActivations"),
        ("quantization", "split-outliers", "SplitOutliers"),
    )
}
"""Name of each pass -> `module:Class`, read through the entry point `planish.passes`."""
