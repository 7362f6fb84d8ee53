"""Fingerprints of the source that was read and tested for each class.

nflows 0.14; normflows 1.7.3; zuko 1.6.0; FrEIA 0.2, and its repository at 4212496; CompVis/iin, net2net and invariances.
``iin_fast.dropin.known.fingerprint`` computes them; a class with another one is left alone.
"""

__all__ = ["SOURCES"]

SOURCES: dict[str, tuple[str, ...]] = {
    "nflows.transforms.coupling.AffineCouplingTransform": ("572b1da8e5a6",),
    "nflows.transforms.coupling.AdditiveCouplingTransform": ("600bea684b8c",),
    "nflows.transforms.coupling.PiecewiseRationalQuadraticCouplingTransform": ("5a924a031b1b",),
    "nflows.transforms.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform": ("a4645d457bac",),
    "nflows.transforms.nonlinearities.PiecewiseRationalQuadraticCDF": ("53b4644937c6",),
    "normflows.flows.affine.coupling.AffineCoupling": ("0a0acabec0ea",),
    "normflows.flows.affine.coupling.MaskedAffineFlow": ("329a02d8b191",),
    "normflows.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling": ("2601b25bb3e1",),
    "normflows.flows.neural_spline.coupling.PiecewiseRationalQuadraticCDF": ("e86658b513a4",),
    "normflows.flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive": ("505bca3198e4",),
    "FrEIA.modules.coupling_layers.GLOWCouplingBlock": ("9eb53a12790d",),
    "FrEIA.modules.coupling_layers.RNVPCouplingBlock": ("3f15b9cacc99",),
    "FrEIA.modules.coupling_layers.GINCouplingBlock": ("e50e13d39310", "ca59f0c353eb"),
    "FrEIA.modules.coupling_layers.AffineCouplingOneSided": ("f314ad51fa04",),
    "FrEIA.modules.coupling_layers.ConditionalAffineTransform": ("c9124454a820",),
    "FrEIA.modules.all_in_one_block.AllInOneBlock": ("d8e6676dba82", "bb09efe25741"),
    "FrEIA.modules.splines.rational_quadratic.RationalQuadraticSpline": ("b876812056cf",),
    "zuko.transforms.MonotonicAffineTransform": ("2e671d9d738b",),
    "zuko.transforms.MonotonicRQSTransform": ("ff07839c29ae",),
    "iin.models.iin.EfficientVRNVP": ("141cf587b3f8",),
    "iin.models.iin.DoubleVectorCouplingBlock": ("62829e2ac537",),
    "iin.models.iin.VectorActNorm": ("1b2588cbc86f",),
    "iin.models.iin.Shuffle": ("c68c952e6dba",),
    "net2net.modules.flow.flatflow.UnconditionalFlatCouplingFlow": ("716935930d2b",),
    "net2net.modules.flow.flatflow.PureAffineFlatCouplingFlow": ("716935930d2b",),
    "net2net.modules.flow.flatflow.ConditionalFlatCouplingFlow": ("3558fb2305ed",),
    "net2net.modules.flow.blocks.ConditionalFlow": ("e101ce0103a3",),
    "net2net.modules.flow.blocks.DoubleVectorCouplingBlock": ("9a6ca1be1e1d",),
    "net2net.modules.flow.blocks.ConditionalDoubleVectorCouplingBlock": ("4ba93cfaa248",),
    "net2net.modules.autoencoder.basic.ActNorm": ("2db6fca0d258",),
    "net2net.modules.flow.blocks.Shuffle": ("c68c952e6dba",),
    "invariances.model.blocks.ConditionalFlow": ("1fa44bcb7572",),
    "invariances.model.blocks.ConditionalDoubleVectorCouplingBlock": ("4ba93cfaa248",),
    "invariances.model.blocks.ActNorm": ("15c1aed89ee0",),
    "invariances.model.blocks.Shuffle": ("c68c952e6dba",),
}
