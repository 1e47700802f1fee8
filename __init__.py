"""Entry point for ComfyUI. Outside ComfyUI this same folder is the package `cascade_nodes`."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's nodes. Imported here, not above: the module must also import where it has no parent
    package.
    """
    from .nodes.extension import CascadeExtension

    return CascadeExtension()
