//! Offsets of tensors in a version's image. The image is a safetensors file: 8 bytes of header length,
//! a JSON header, data without holes. Owns the header's exact bytes, a pure function of the tensors, so
//! that both sides can check it.

use anabranch_proto::manifest::{
    DType, Manifest, ManifestError, Tensor, check_tensors, tensor_bytes,
};

/// A tensor before it has a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name, unique within the version.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
}

/// The tensors of one image with their places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    tensors: Vec<Tensor>,
    /// Index in `tensors` for each tensor in the caller's order.
    placed: Vec<usize>,
    header: Vec<u8>,
    image_bytes: u64,
}

/// Why tensors make no image, or an image does not fit its manifest.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// There are no tensors.
    #[error("no tensors to lay out")]
    Empty,
    /// A tensor is too large.
    #[error("tensor `{name}`: {shape:?} of {dtype} overflows 64 bits")]
    Overflow { name: String, dtype: DType, shape: Vec<u64> },
    /// The tensors break a bound of manifests.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The image begins with another header.
    #[error("the image starts with another safetensors header than its manifest describes")]
    Header,
}

// === impl Layout ===

impl Layout {
    /// Wide elements first, so that each tensor is aligned to its element; else the order given, which
    /// engines that load layer by layer rely on.
    pub fn new(specs: &[TensorSpec]) -> Result<Layout, LayoutError> {
        if specs.is_empty() {
            return Err(LayoutError::Empty);
        }
        let mut order: Vec<usize> = (0..specs.len()).collect();
        order.sort_by_key(|&ix| std::cmp::Reverse(specs[ix].dtype.bytes()));
        let mut placed = vec![0; specs.len()];
        let mut tensors = Vec::with_capacity(specs.len());
        let mut end = 0u64;
        for (at, &ix) in order.iter().enumerate() {
            let TensorSpec { name, dtype, shape } = &specs[ix];
            let sized =
                tensor_bytes(*dtype, shape).and_then(|len| Some((len, end.checked_add(len)?)));
            let Some((len, next)) = sized else {
                let (name, dtype, shape) = (name.clone(), *dtype, shape.clone());
                return Err(LayoutError::Overflow { name, dtype, shape });
            };
            let (name, dtype, shape) = (name.clone(), *dtype, shape.clone());
            tensors.push(Tensor { name, dtype, shape, offset: end, len });
            placed[ix] = at;
            end = next;
        }
        let header = header(&tensors);
        for t in &mut tensors {
            t.offset += header.len() as u64;
        }
        let image_bytes = end + header.len() as u64;
        check_tensors(&tensors, image_bytes)?;
        Ok(Layout { tensors, placed, header, image_bytes })
    }

    /// The tensors, in the order of their offsets.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The place of the caller's `ix`-th tensor.
    pub fn tensor(&self, ix: usize) -> &Tensor {
        &self.tensors[self.placed[ix]]
    }

    /// Length prefix and JSON: the first bytes of the image.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Length of the image in bytes, header included.
    pub fn image_bytes(&self) -> u64 {
        self.image_bytes
    }
}

/// The bytes that an image with this manifest must start with.
pub fn expected_header(manifest: &Manifest) -> Result<Vec<u8>, LayoutError> {
    let first = manifest.tensors.first().ok_or(LayoutError::Empty)?.offset;
    let mut relative = manifest.tensors.clone();
    for t in &mut relative {
        t.offset -= first;
    }
    let header = header(&relative);
    let contiguous = relative.windows(2).all(|w| w[0].offset + w[0].len == w[1].offset);
    let end = manifest.tensors.last().map(|t| t.offset + t.len);
    if header.len() as u64 != first || !contiguous || end != Some(manifest.image_bytes) {
        return Err(LayoutError::Header);
    }
    Ok(header)
}

fn header(tensors: &[Tensor]) -> Vec<u8> {
    let mut json = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    for t in tensors {
        let name = serde_json::Value::from(t.name.as_str());
        let (start, end) = (t.offset, t.offset + t.len);
        let shape: Vec<String> = t.shape.iter().map(u64::to_string).collect();
        let (dtype, shape) = (t.dtype.name(), shape.join(","));
        json.push_str(&format!(
            ",{name}:{{\"dtype\":\"{dtype}\",\"shape\":[{shape}],\"data_offsets\":[{start},{end}]}}"
        ));
    }
    json.push('}');
    // Padded with spaces so that the data starts at a multiple of 64, which any load can rely on.
    let padded = (json.len() + 8).next_multiple_of(64) - 8;
    let mut out = (padded as u64).to_le_bytes().to_vec();
    out.extend_from_slice(json.as_bytes());
    out.resize(padded + 8, b' ');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, dtype: DType, shape: &[u64]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }
    }

    #[test]
    fn the_image_is_what_the_safetensors_crate_reads() {
        let specs = [
            spec("b\"quote", DType::U8, &[3]),
            spec("a", DType::BF16, &[2, 5]),
            spec("empty", DType::F32, &[0, 4]),
            spec("c", DType::F32, &[2]),
        ];
        let layout = Layout::new(&specs).expect("layout");
        let mut image = layout.header().to_vec();
        image.extend((0..layout.image_bytes() - image.len() as u64).map(|i| i as u8));
        let read = safetensors::SafeTensors::deserialize(&image).expect("a safetensors file");
        for (ix, s) in specs.iter().enumerate() {
            let view = read.tensor(&s.name).expect("present");
            let t = layout.tensor(ix);
            assert_eq!(view.data(), &image[t.offset as usize..(t.offset + t.len) as usize]);
            assert_eq!(view.shape(), s.shape.iter().map(|d| *d as usize).collect::<Vec<_>>());
            assert_eq!(t.offset % t.dtype.bytes() as u64, 0);
        }
    }

    #[test]
    fn a_header_that_disagrees_with_its_manifest_is_noticed() {
        let layout = Layout::new(&[spec("a", DType::F32, &[64]), spec("b", DType::U8, &[7])]);
        let layout = layout.expect("layout");
        let chunk_hashes = vec![[0; 32]];
        let mut m = Manifest {
            kind: anabranch_proto::manifest::Kind::Full,
            chunk_bytes: 1 << 20,
            image_bytes: layout.image_bytes(),
            tensors: layout.tensors().to_vec(),
            chunk_hashes,
        };
        assert_eq!(expected_header(&m).expect("same"), layout.header());
        m.tensors[0].name =
            "renamed-to-something-so-long-that-the-padding-grows-by-another-line".into();
        assert_eq!(expected_header(&m), Err(LayoutError::Header));
    }

    #[test]
    fn a_shape_that_overflows_and_an_empty_list_are_refused() {
        assert_eq!(Layout::new(&[]), Err(LayoutError::Empty));
        let huge = spec("x", DType::F64, &[u64::MAX, 2]);
        assert!(matches!(Layout::new(&[huge]), Err(LayoutError::Overflow { .. })));
        let half = spec("x", DType::U8, &[u64::MAX / 2]);
        let more = spec("y", DType::U8, &[u64::MAX / 2 + 9]);
        assert!(matches!(Layout::new(&[half, more]), Err(LayoutError::Overflow { .. })));
    }
}
