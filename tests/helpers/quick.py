"""What `pytest -m quick` runs: a part of everything important, in less than a minute."""

#: Files, and tests or single cases of them: the beginnings of pytest's names below `tests/`.
QUICK = (
    # Structure, arguments, documentation.
    "test_structure.py",
    "test_options.py",
    "test_paths.py",
    "test_schedules.py::test_compares_hashes_and_pickles_by_value",
    "test_schedules.py::test_bad_arguments",
    "docs/test_readme.py",
    "docs/test_docs.py::test_links_lead_somewhere",
    "docs/test_docs.py::test_index_names_every_page",
    # Each optimizer against the transcription of its paper; the presets' transcriptions against the frameworks.
    "rules/test_oracles.py::test_follows_its_paper_for_1000_steps",
    "test_presets.py::test_oracle_is_the_record",
    "test_presets.py::test_every_preset_is_here_and_every_record_has_its_preset",
    "rules/test_exactness.py::test_error_of_the_update_is_below_1e_6[number-0.9999]",
    # The laws and the leaves.
    "rules/test_laws.py::test_composition",
    "rules/test_laws.py::test_elementwise",
    "rules/test_laws.py::test_float32_storage_is_the_identity",
    "rules/test_leaves.py::test_every_kind_of_leaf[0.1-16bit-adam]",
    "rules/test_leaves.py::test_gradients_that_do_not_fit",
    "rules/test_leaves.py::test_states_that_do_not_fit",
    "rules/test_dtypes.py::test_state_types_are_stable[adam-",
    # Storage, and how a step runs.
    "test_storage_in_use.py::test_errors_of_storage",
    "test_storage_in_use.py::test_state_bytes",
    "test_storage_in_use.py::test_storage_mask",
    "rules/test_dtypes.py::test_every_finite_gradient_and_no_other[bfloat16-16bit]",
    # What is written to low-precision parameters.
    "test_write.py::test_split_and_join_are_lossless",
    "test_write.py::test_any_parameter_joins_any_remainder",
    "test_write.py::test_training_is_that_of_float32[8]",
    "test_write.py::test_rounded_updates_land_where_they_cancel",
    "test_write.py::test_rounding_is_even_in_time_and_to_a_neighbour",
    "test_write_in_use.py::test_errors",
    # Around an optimizer.
    "test_wrappers.py::test_lamb_follows_its_paper[options0]",
    "test_wrappers.py::test_swats_follows_its_paper[constant]",
    "test_wrappers.py::test_cautious_follows_its_paper",
    "test_wrappers_in_use.py::test_bad_options",
    "test_guard.py::test_past_the_limit_the_failure_shows_as_in_optax",
    "test_groups.py::test_every_member_follows_its_groups[adam]",
    "test_groups.py::test_a_pattern_that_matches_nothing_is_an_error",
    "test_diagnostics.py::test_what_is_not_there_is_an_error",
    # Several devices, checkpoints, frameworks.
    "test_sharding.py::test_inside_shard_map[16bit-AxisType.Auto]",
    "test_zero1.py::test_the_same_steps_with_an_eighth_of_the_state[16bit-AxisType.Auto]",
    "test_zero1.py::test_errors_name_what_is_wrong",
    "interop/test_interop_storage.py::test_there_and_back",
    "test_checkpoint.py::test_another_checkpoint_is_an_error_that_names_what_differs",
    "interop/test_interop_optax.py::test_weights_are_those_of_the_count",
    "interop/test_interop_frameworks.py::test_every_record_is_tested",
    "frameworks/test_optax.py::test_gradient_transformation_protocol",
    "frameworks/test_frameworks.py::test_linen_train_state[adam]",
    "frameworks/test_frameworks.py::test_nnx_optimizer[adam]",
    "frameworks/test_frameworks.py::test_equinox[adam]",
    # Examples and benchmarks, as far as they run nothing.
    "examples/test_mnist_loader.py",
    "examples/test_imdb_loader.py",
    "benchmarks/test_compiled.py",
)


def unknown(names: list[str]) -> list[str]:
    """Which entries none of these names of tests begins with."""
    return [entry for entry in QUICK if not any(name.startswith(entry) for name in names)]
