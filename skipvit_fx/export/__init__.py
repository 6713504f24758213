"""ONNX files. Needs the extra ``skipvit_fx[onnx]`` only when used."""
