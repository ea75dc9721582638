"""The file of `casa-serve --ray FILE`: a cluster configuration, or a Serve config file with one.

A Serve config file is the format of `serve deploy` and of `deploy/`. Keys that have no effect here are
rejected rather than ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from casa_engine.errors import InputError
from casa_serving.cluster.address import MAX_PORT
from casa_serving.cluster.config import sentence

IMPORT_PATH = "casa_serving.cluster:build_app"
FILE_KEYS = ("applications", "http_options", "proxy_location")
APPLICATION_KEYS = ("name", "route_prefix", "import_path", "args")


@dataclass(frozen=True)
class ConfigFile:
    """Contents of a file.

    Attributes:
        args: The cluster configuration (`parse_config`).
        http_options: Ray Serve's options of its HTTP proxies.
        proxy_location: The nodes that run one: EveryNode, HeadOnly or Disabled.
    """

    args: dict[str, Any] = field(default_factory=dict)
    http_options: dict[str, Any] = field(default_factory=dict)
    proxy_location: str = "EveryNode"


def read_file(path: Path) -> ConfigFile:
    """Read a YAML file.

    Raises:
        InputError: It cannot be read, or is neither.
    """
    try:
        loaded = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The configuration {str(path)!r} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"The configuration {str(path)!r} is not a mapping of keys to values.")
    return of_serve(loaded, path) if "applications" in loaded else ConfigFile(args=loaded)


def of_serve(loaded: dict[str, Any], path: Path) -> ConfigFile:
    """Return the contents of a Serve config file.

    Args:
        loaded: Its content.
        path: Its name, for errors.
    """
    applications = loaded["applications"]
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise InputError(f"{str(path)!r} must have exactly one application; deploy others with `serve deploy`.")
    (application,) = applications
    strange = sorted({*loaded} - {*FILE_KEYS}) + sorted({*application} - {*APPLICATION_KEYS})
    if strange:
        raise InputError(
            f"casa-serve --ray does not take the keys {strange} in {str(path)!r}: expected "
            f"{', '.join(FILE_KEYS)}, and {', '.join(APPLICATION_KEYS)} of its application. Deploy the file with "
            "`serve deploy`, which takes all of Ray Serve's keys."
        )
    if application.get("import_path") != IMPORT_PATH or application.get("route_prefix", "/") != "/":
        raise InputError(
            f"casa-serve --ray serves {IMPORT_PATH} at /; {str(path)!r} has "
            f"{application.get('import_path')} at {application.get('route_prefix', '/')}. Use `serve deploy`."
        )
    options = loaded.get("http_options") or {}
    location = loaded.get("proxy_location", "EveryNode")
    check_http(options, location, path)
    return ConfigFile(application.get("args") or {}, options, location)


def check_http(options: Any, location: Any, path: Path) -> None:
    """Reject options that Ray Serve would ignore, or reject later.

    Args:
        options: `http_options`.
        location: `proxy_location`.
        path: The file's name, for errors.
    """
    from ray.serve.config import HTTPOptions, ProxyLocation

    places = [place.value for place in ProxyLocation]
    if location not in places:
        raise InputError(f"{str(path)!r} has the proxy_location {location!r}, expected one of {', '.join(places)}.")
    if not isinstance(options, dict) or (strange := sorted({*options} - {*HTTPOptions.model_fields})):
        known = ", ".join(HTTPOptions.model_fields)
        what = f"the keys {strange}" if isinstance(options, dict) else repr(options)
        raise InputError(f"{str(path)!r} has {what} in http_options, expected of {known}.")
    try:
        port = HTTPOptions(**options).port
    except ValidationError as error:
        raise InputError(f"http_options in {str(path)!r}: {'; '.join(map(sentence, error.errors()))}.") from error
    if not 0 <= port <= MAX_PORT:
        raise InputError(f"http_options in {str(path)!r}: port: expected a port from 0 to {MAX_PORT}, got {port}.")
