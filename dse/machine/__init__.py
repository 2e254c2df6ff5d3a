"""Profile this machine: its data sheet, a device, calibration records and the measured rows.

write_profile(profile_machine(), "my_machine.toml")
"""

from .profile import (
    MachineProfile,
    WrittenProfile,
    check_same_machine,
    profile_arguments,
    profile_command,
    profile_machine,
    profile_paths,
    profile_suites,
    this_machine,
    write_profile,
)

__all__ = [
    "MachineProfile",
    "WrittenProfile",
    "check_same_machine",
    "profile_arguments",
    "profile_command",
    "profile_machine",
    "profile_paths",
    "profile_suites",
    "this_machine",
    "write_profile",
]
