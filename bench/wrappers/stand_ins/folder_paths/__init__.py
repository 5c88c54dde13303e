"""Folders of a ComfyUI that has one set of models, in the folder of the environment variable STAND_IN_COMFY."""

import os
import tempfile

models_dir = os.environ.get("STAND_IN_COMFY", "models")


def get_temp_directory():
    return tempfile.gettempdir()


def get_output_directory():
    return tempfile.gettempdir()


def get_folder_paths(kind):
    return [os.path.join(models_dir, kind)]


def get_filename_list(kind):
    place = os.path.join(models_dir, kind)
    return sorted(os.listdir(place)) if os.path.isdir(place) else []


def get_full_path(kind, name):
    path = os.path.join(models_dir, kind, name)
    return path if os.path.exists(path) else None
