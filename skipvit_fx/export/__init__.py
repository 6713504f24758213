"""ONNX files, and what is known of the tools that read them. Needs the extra ``skipvit_fx[onnx]`` only when used."""
