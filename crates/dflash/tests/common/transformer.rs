//! A small transformer with random weights over the cache: the model of tests, examples and benches.

use dflash::{BoxError, Pass, Target};
use kvcache::{Cache, Config, Options};
use ndarray::{Array1, Array2, Array3, ArrayView2, ArrayViewMut2, Axis};
use tensor_utils::gemm;
use tensor_utils::testing::Seeded;

/// Sizes of the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) vocabulary: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) key_heads: usize,
    pub(crate) head_size: usize,
}

impl Sizes {
    #[allow(dead_code, reason = "not every user of this file needs it")]
    pub(crate) const SMALL: Self =
        Self { vocabulary: 61, layers: 2, heads: 4, key_heads: 2, head_size: 8 };

    /// The cache that the model needs.
    pub(crate) fn cache(self) -> Config {
        Config::new(self.layers, self.key_heads, self.head_size)
    }
}

#[derive(Debug)]
struct Layer {
    wq: Array2<f32>,
    wk: Array2<f32>,
    wv: Array2<f32>,
    wo: Array2<f32>,
    up: Array2<f32>,
    down: Array2<f32>,
}

/// Pre-norm blocks of attention and a two-layer perceptron, sinusoidal positions, tied embedding.
#[derive(Debug)]
pub(crate) struct Transformer {
    sizes: Sizes,
    embedding: Array2<f32>,
    layers: Vec<Layer>,
}

impl Transformer {
    pub(crate) fn new(sizes: Sizes, seed: u64) -> Self {
        let mut seeded = Seeded::new(seed);
        let width = sizes.heads * sizes.head_size;
        let keys = sizes.key_heads * sizes.head_size;
        let mut matrix = |rows: usize, columns: usize| {
            seeded.normal::<f32, _>((rows, columns)).mapv(|x| x / (rows as f32).sqrt())
        };
        let layers = (0..sizes.layers)
            .map(|_| Layer {
                wq: matrix(width, width),
                wk: matrix(width, keys),
                wv: matrix(width, keys),
                wo: matrix(width, width),
                up: matrix(width, 2 * width),
                down: matrix(2 * width, width),
            })
            .collect();
        let embedding = seeded.normal((sizes.vocabulary, width));
        Self { sizes, embedding, layers }
    }

    /// The model that stops after some layers.
    #[allow(dead_code, reason = "not every user of this file needs it")]
    pub(crate) fn first_layers(mut self, layers: usize) -> Self {
        self.layers.truncate(layers);
        self.sizes.layers = self.layers.len();
        self
    }

    fn embed(&self, batch: &[Pass<'_>]) -> Array2<f32> {
        let width = self.embedding.ncols();
        let rows = batch.iter().flat_map(|pass| pass.tokens.iter().zip(&pass.positions));
        let rows: Vec<_> = rows.collect();
        Array2::from_shape_fn((rows.len(), width), |(row, c)| {
            let (&token, &position) = rows[row];
            let angle = position as f32 / 100_f32.powf((c / 2) as f32 / width as f32);
            let wave = if c % 2 == 0 { angle.sin() } else { angle.cos() };
            self.embedding[[token as usize, c]] + wave
        })
    }
}

impl Target for Transformer {
    fn vocabulary(&self) -> usize {
        self.sizes.vocabulary
    }

    fn forward(
        &mut self,
        cache: &mut Cache,
        batch: &[Pass<'_>],
        logits: Option<ArrayViewMut2<'_, f32>>,
    ) -> Result<(), BoxError> {
        let Sizes { heads, key_heads, head_size, .. } = self.sizes;
        let mut x = self.embed(batch);
        let rows = x.nrows();
        let seqs: Vec<_> = batch.iter().map(|pass| pass.seq).collect();
        let lengths: Vec<_> = batch.iter().map(|pass| pass.tokens.len()).collect();
        let queries: Vec<_> = batch.iter().map(Pass::queries).collect();
        for (index, layer) in self.layers.iter().enumerate() {
            let h = normalised(&x);
            let q = split(product(h.view(), layer.wq.view())?, heads)?;
            let k = split(product(h.view(), layer.wk.view())?, key_heads)?;
            let v = split(product(h.view(), layer.wv.view())?, key_heads)?;
            cache.append_batch(index, &seqs, &lengths, k.view(), v.view())?;
            let o = cache.attend(index, q.view(), &queries, &Options::default())?.o;
            let o = o.into_shape_with_order((rows, heads * head_size))?;
            x += &product(o.view(), layer.wo.view())?;
            let hidden = product(normalised(&x).view(), layer.up.view())?.mapv(f32::tanh);
            x += &product(hidden.view(), layer.down.view())?;
        }
        if let Some(mut logits) = logits {
            gemm(&mut logits, &normalised(&x), &self.embedding.t(), 1.0, 0.0)?;
        }
        Ok(())
    }
}

fn product(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Result<Array2<f32>, BoxError> {
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    gemm(&mut c, &a, &b, 1.0, 0.0)?;
    Ok(c)
}

fn split(x: Array2<f32>, heads: usize) -> Result<Array3<f32>, BoxError> {
    let (rows, width) = x.dim();
    Ok(x.into_shape_with_order((rows, heads, width / heads))?)
}

fn normalised(x: &Array2<f32>) -> Array2<f32> {
    let squares: Array1<f32> = x.map_axis(Axis(1), |row| row.iter().map(|x| x * x).sum());
    let mut y = x.clone();
    for (mut row, square) in y.rows_mut().into_iter().zip(squares) {
        let factor = 1.0 / (square / row.len() as f32 + 1e-6).sqrt();
        row.mapv_inplace(|x| x * factor);
    }
    y
}
