"""The GPUs that launch plans are made for, as XLA is told of them."""

from __future__ import annotations

import dataclasses

from flora_jax.device import ADA


@dataclasses.dataclass(frozen=True)
class Target:
    """A device as XLA's cost models describe it; bandwidth in bytes a second.

    The figures are XLA's own: openxla/xla
    `xla/backends/gpu/target_config/specs/{h100_sxm,a100_sxm_80}.txtpb`; the L4's are NVIDIA's.
    """

    name: str
    capability: tuple[int, int]
    features: str  # of the capability, as XLA writes them
    cores: int
    fpus_per_core: int
    clock_ghz: float
    bandwidth: int
    l2_bytes: int
    memory_bytes: int
    shared_per_core: int
    shared_per_block: int

    @property
    def has_float8(self) -> bool:
        """Whether its processors convert float8."""
        return self.capability >= ADA

    @property
    def description(self) -> str:
        """The text form of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        capability = f"major: {major} minor: {minor} {self.features}"
        return f"""
            platform_name: "CUDA"  device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 }}  runtime_version {{ major: 12 minor: 8 }}
            gpu_device_info {{
              cuda_compute_capability {{ {capability} }}
              core_count: {self.cores}  fpus_per_core: {self.fpus_per_core}
              clock_rate_ghz: {self.clock_ghz}
              memory_bandwidth: {self.bandwidth}  l2_cache_size: {self.l2_bytes}
              device_memory_size: {self.memory_bytes}
              shared_memory_per_core: {self.shared_per_core}  shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_per_block}
              threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
              registers_per_core_limit: 65536  registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
              thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
              driver_version: "13.0.0"  runtime_version: "12.8.0"
              compile_time_toolkit_version: "12.8.0"  dnn_version: "9.10.0"
            }}"""


TARGETS = {
    "h100": Target(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        "feature_extension: ACCELERATED_FEATURES",
        132,
        128,
        1.98,
        3352320000000,
        52428800,
        84942979072,
        233472,
        232448,
    ),
    "a100": Target(
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        "",
        108,
        64,
        1.41,
        2039040000000,
        41943040,
        85100068864,
        167936,
        166912,
    ),
    "l4": Target(
        "NVIDIA L4",
        (8, 9),
        "",
        58,
        128,
        2.04,
        300000000000,
        50331648,
        23000000000,
        102400,
        101376,
    ),
}
