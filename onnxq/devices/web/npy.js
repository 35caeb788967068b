// NumPy's .npy files <-> tensors of ONNX Runtime Web.
// Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html

const KINDS = {
  "<f4": ["float32", Float32Array],
  "<f2": ["float16", globalThis.Float16Array ?? Uint16Array],
  "<f8": ["float64", Float64Array],
  "|i1": ["int8", Int8Array],
  "|u1": ["uint8", Uint8Array],
  "<i2": ["int16", Int16Array],
  "<u2": ["uint16", Uint16Array],
  "<i4": ["int32", Int32Array],
  "<u4": ["uint32", Uint32Array],
  "<i8": ["int64", BigInt64Array],
  "<u8": ["uint64", BigUint64Array],
  "|b1": ["bool", Uint8Array],
};

export function fromNpy(ort, buffer) {
  const view = new DataView(buffer);
  const wide = view.getUint8(6) > 1; // since version 2 the header's length takes four bytes
  const length = wide ? view.getUint32(8, true) : view.getUint16(8, true);
  const start = (wide ? 12 : 10) + length;
  const header = new TextDecoder().decode(buffer.slice(wide ? 12 : 10, start));
  const kind = /'descr': '([^']+)'/.exec(header)[1];
  if (!(kind in KINDS)) throw new Error(`a page takes no arrays of NumPy's ${kind}`);
  if (/'fortran_order': True/.test(header)) throw new Error("give the array in C order");
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((n) => n.trim()).map(Number);
  const [type, Values] = KINDS[kind];
  return new ort.Tensor(type, new Values(buffer.slice(start)), shape);
}

export function toNpy(tensor) {
  const found = Object.entries(KINDS).find(([, [type]]) => type === tensor.type);
  if (!found) throw new Error(`a page gives no arrays of ${tensor.type}`);
  const shape = tensor.dims.join(", ") + (tensor.dims.length === 1 ? "," : "");
  let header = `{'descr': '${found[0]}', 'fortran_order': False, 'shape': (${shape}), }`;
  header = header.padEnd(Math.ceil((header.length + 11) / 64) * 64 - 11) + "\n";
  const values = tensor.data;
  const bytes = new Uint8Array(10 + header.length + values.byteLength);
  bytes.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0]);
  new DataView(bytes.buffer).setUint16(8, header.length, true);
  bytes.set(new TextEncoder().encode(header), 10);
  bytes.set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength), 10 + header.length);
  return bytes;
}
