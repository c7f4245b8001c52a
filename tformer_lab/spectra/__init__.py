"""The instrument: spectra of weight matrices, their tails, bulks and nulls. What is named here loads with its module when first used."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["analysis", "changes", "checkpoints", "decomposition", "free_convolution", "history", "matrices", "metrics", "nulls", "percentiles", "random_matrix", "sources", "tails", "tracking"],
    submod_attrs={
        "analysis": ["analyze"],
        "changes": ["gradient_matrices", "weight_difference"],
        "checkpoints": ["find_checkpoints", "from_checkpoints"],
        "decomposition": ["MatrixSpectrum", "read_spectra", "singular_values", "singular_vectors"],
        "free_convolution": ["FreeLaw", "denoise", "denoise_symmetric", "denoising_error", "product_law", "semicircle_law", "wishart_law"],
        "history": ["SpectrumHistory", "SpectrumRecord"],
        "matrices": ["Product", "weight_matrices"],
        "metrics": ["condition_number", "decay_exponent", "decay_r2", "effective_rank", "entropy_rank", "frobenius_norm", "inverse_participation", "numerical_rank", "participation_ratio",
                    "quantiles", "spectral_entropy", "spectral_metrics", "spectral_norm", "stable_rank"],
        "nulls": ["compare_with_null", "gaussian_null", "null_band", "permutation_nulls", "product_null"],
        "percentiles": ["band_of", "percentile_in", "verdict"],
        "random_matrix": ["MarchenkoPastur", "QuarterCircle", "Semicircle", "detection_threshold", "fit_marchenko_pastur", "largest_eigenvalue_quantile", "spike_overlap", "spike_strength",
                          "spiked_singular_value", "spikes", "tracy_widom_cdf", "tracy_widom_pdf", "tracy_widom_ppf", "tracy_widom_sf"],
        "sources": ["open_tensors"],
        "tails": ["PowerLawFit", "compare_tails", "fit_power_law", "fit_tails", "goodness_of_fit", "hill", "xmin_table"],
        "tracking": ["overlap_table", "principal_cosines", "subspace_overlap", "track"],
    },
)
